package origin

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"syscall"
	"time"
)

// failure is one attempt that went wrong, and what may be done about it.
type failure struct {
	kind   error // a sentinel
	cause  error // below it, or nil
	status int   // the HTTP status, 0 without an answer
	code   string
	text   string // the registry's own words
	again  patience
	pause  time.Duration // what the host asked for; 0 is nothing
	hint   string
}

// patience says how often a failure is worth another attempt.
type patience uint8

const (
	never     patience = iota // it will be the same again
	once                      // it took long already
	briefly                   // nobody there: a restart, or down
	patiently                 // busy, or an accident
)

// statusFailure is what an HTTP status means by itself.
func statusFailure(status int) failure {
	f := failure{status: status, kind: ErrUnexpected}
	switch {
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		f.kind = ErrDenied
	case status == http.StatusNotFound, status == http.StatusGone:
		f.kind = ErrNotFound
	case status == http.StatusTooManyRequests:
		f.kind, f.again = ErrRateLimited, patiently
	case status == http.StatusRequestTimeout:
		f.kind, f.again = ErrUnavailable, patiently
	case status == http.StatusNotImplemented, status == http.StatusHTTPVersionNotSupported:
	case status >= 500:
		f.kind, f.again = ErrUnavailable, patiently
	}
	return f
}

// wireFailure is what an error of the transport means.
func wireFailure(err error) failure {
	f := failure{kind: ErrUnavailable, cause: bare(err), again: patiently}
	var (
		dns     *net.DNSError
		timeout interface{ Timeout() bool }
	)
	switch {
	case errors.Is(err, errInward):
		f.again = never
	case errors.Is(err, http.ErrSchemeMismatch):
		f.kind, f.again = ErrTLS, never
		f.hint = "it speaks plain HTTP: use --insecure if you trust the network to it"
	case isTLS(err):
		f.kind, f.again = ErrTLS, never
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH):
		f.again = briefly
	case errors.As(err, &dns):
		f.again = briefly
	case errors.As(err, &timeout) && timeout.Timeout(), errors.Is(err, os.ErrDeadlineExceeded):
		f.again = once
	}
	return f
}

// isTLS reports whether err says that the two ends could not agree on TLS, or that one does not trust the other.
func isTLS(err error) bool {
	var (
		verify   *tls.CertificateVerificationError
		record   tls.RecordHeaderError
		alert    tls.AlertError
		unknown  x509.UnknownAuthorityError
		hostname x509.HostnameError
		invalid  x509.CertificateInvalidError
	)
	return errors.As(err, &verify) || errors.As(err, &record) || errors.As(err, &alert) ||
		errors.As(err, &unknown) || errors.As(err, &hostname) || errors.As(err, &invalid)
}

// bare strips the URL from an error of net/http: its query may be a signature, and the sentence names the host anyway.
func bare(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	if errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return io.ErrUnexpectedEOF // the far end hung up; plain EOF reads like success to a caller of errors.Is
	}
	return err
}

// ended reports the end of the caller's context, as the error to return for it.
func ended(ctx context.Context) error {
	if ctx.Err() == nil {
		return nil
	}
	if cause := context.Cause(ctx); !errors.Is(cause, ctx.Err()) {
		return fmt.Errorf("%w: %w", ctx.Err(), cause)
	}
	return ctx.Err()
}
