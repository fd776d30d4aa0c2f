// Package utp stands where github.com/anacrolix/go-utp would be. The torrent
// library imports that module even when uTP is switched off; this program
// speaks BitTorrent over TLS on TCP only, so every entry point here refuses.
package utp

import (
	"context"
	"errors"
	"log/slog"
	"net"
)

// ErrNotBuilt is the error of every attempt to open a uTP socket.
var ErrNotBuilt = errors.New("uTP is not part of this build")

// Default names the uTP implementation for the library's status page.
const Default = "none"

type (
	// FirewallCallback decides whether an incoming uTP handshake is dropped.
	FirewallCallback func(net.Addr) bool
	// Option adjusts a socket; no option has an effect here.
	Option func(*settings)

	settings struct{}
)

// Socket is the interface the torrent library expects of a uTP socket.
type Socket interface {
	net.PacketConn
	Accept() (net.Conn, error)
	Addr() net.Addr
	DialContext(ctx context.Context, network, addr string) (net.Conn, error)
	SetFirewallCallback(FirewallCallback)
}

// WithLogger is accepted and ignored.
func WithLogger(*slog.Logger) Option { return func(*settings) {} }

// NewSocket always returns ErrNotBuilt.
func NewSocket(string, string, ...Option) (Socket, error) { return nil, ErrNotBuilt }

// NewSocketFromPacketConn always returns ErrNotBuilt.
func NewSocketFromPacketConn(net.PacketConn, ...Option) (Socket, error) { return nil, ErrNotBuilt }
