package origin

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"unicode"
)

// What went wrong, for errors.Is. Each error of this package about a registry is an *Error that wraps one of them.
var (
	// ErrNotFound: the registry has no such repository, manifest or blob, and said so to someone who may know.
	ErrNotFound = errors.New("not found")
	// ErrDenied: the credential, or its lack, is the trouble. Registries that hide private repositories also say this
	// of what does not exist.
	ErrDenied = errors.New("access denied")
	// ErrTLS: the registry's certificate is not trusted, or one side does not speak TLS as the other wants.
	ErrTLS = errors.New("no trusted TLS connection")
	// ErrUnavailable: it could not be reached at all, broke off for good, or kept answering 5xx. What is cached may be used.
	ErrUnavailable = errors.New("the registry is not available")
	// ErrRateLimited: it kept answering 429.
	ErrRateLimited = errors.New("the registry's rate limit is reached")
	// ErrMismatch: what came is not what was asked for: another digest, size, range or kind of document.
	ErrMismatch = errors.New("the content is not what was asked for")
	// ErrTooLarge: a manifest above 8 MiB.
	ErrTooLarge = errors.New("the manifest is larger than 8 MiB")
	// ErrUnsupported: a manifest of a kind that nobody can run any more, or not yet.
	ErrUnsupported = errors.New("the kind of manifest is not supported")
	// ErrUnexpected: an answer that the distribution protocol does not know.
	ErrUnexpected = errors.New("unexpected answer")
)

// Error is a failure to read something of a registry, as a sentence for the person who must act.
type Error struct {
	Op        string // what was attempted: "read the manifest of"
	Reference string // of what: a name with tag or digest
	Host      string // who was asked: the registry, its mirror, or where it redirected to
	Status    int    // the HTTP status of the last answer, 0 without one
	Code      string // the registry's error code (MANIFEST_UNKNOWN, DENIED …) or ""
	Message   string // its message, made printable, or ""
	Hint      string // what to try, or ""
	Err       error  // wraps a sentinel of this package
}

// Error is one line: what failed on what, who said what, what to try.
func (e *Error) Error() string {
	var b strings.Builder
	if e.Op != "" {
		fmt.Fprintf(&b, "cannot %s ", e.Op)
	}
	fmt.Fprintf(&b, "%s: ", e.Reference)
	if e.Err != nil {
		b.WriteString(oneLine(e.Err.Error(), maxSentence))
	}
	switch {
	case e.Status != 0:
		fmt.Fprintf(&b, ": %s answered %d %s", e.Host, e.Status, http.StatusText(e.Status))
		if said := join(e.Code, e.Message); said != "" {
			fmt.Fprintf(&b, " (%s)", said)
		}
	case e.Host != "":
		fmt.Fprintf(&b, " (asked %s)", e.Host)
	}
	if e.Hint != "" {
		fmt.Fprintf(&b, "; %s", e.Hint)
	}
	return b.String()
}

// Unwrap gives the sentinel and what lies below.
func (e *Error) Unwrap() error { return e.Err }

const (
	maxCode     = 64  // the longest code of the specification has 21 characters
	maxMessage  = 240 // three lines of a terminal: messages are for people
	maxSentence = 600 // some certificate errors list all names
)

// ociErrors is the body of an error by the distribution specification, with the fields that others use instead: Quay's
// own API and several proxies. S3 and its kin answer in XML.
type ociErrors struct {
	Errors []struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	} `json:"errors"`
	Code         string `json:"code"`
	Message      string `json:"message"`
	Error        string `json:"error"`
	ErrorMessage string `json:"error_message"`
	Details      string `json:"details"`
}

// parseErrorBody finds the code and the message in the body of an error. What it cannot read gives empty strings: a page of
// HTML is no message. Both come back as one printable line of bounded length.
func parseErrorBody(body []byte) (code, message string) {
	body = body[:min(len(body), maxErrorBody)]
	var e ociErrors
	switch text := strings.TrimSpace(string(body)); {
	case strings.HasPrefix(text, "{"):
		// A field of another type than expected spoils only itself: json goes on and reports it at the end.
		_ = json.Unmarshal([]byte(text), &e)
		if len(e.Errors) > 0 {
			e.Code, e.Message = e.Errors[0].Code, e.Errors[0].Message
		}
		for _, m := range []string{e.ErrorMessage, e.Details, e.Error} {
			if e.Message == "" {
				e.Message = m
			}
		}
	case strings.HasPrefix(text, "<?xml"), strings.HasPrefix(text, "<Error"):
		var x struct {
			XMLName xml.Name `xml:"Error"`
			Code    string
			Message string
		}
		if xml.Unmarshal([]byte(text), &x) == nil {
			e.Code, e.Message = x.Code, x.Message
		}
	case !strings.HasPrefix(text, "<"):
		e.Message = text
	}
	return oneLine(e.Code, maxCode), oneLine(e.Message, maxMessage)
}

// oneLine makes text from outside fit to be printed: no control characters, no direction marks, one line, at most n runes.
func oneLine(s string, n int) string {
	var b strings.Builder
	count, space := 0, false
	for _, r := range s {
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar || r == ' ' {
			space = count > 0
			continue
		}
		if count >= n {
			b.WriteString("…")
			break
		}
		if space {
			b.WriteByte(' ')
			space = false
		}
		b.WriteRune(r)
		count++
	}
	return b.String()
}

func join(code, message string) string {
	switch {
	case code == "":
		return message
	case message == "":
		return code
	}
	return code + ": " + message
}
