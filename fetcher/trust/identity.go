package trust

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net"
	"slices"
	"time"
)

// Protocols that share a node's port, as ALPN names (RFC 7301).
const (
	// ProtoSwarm is BitTorrent's peer protocol. The version rises when old and new nodes must not be peers.
	ProtoSwarm = "quay-swarm/1"
	// ProtoGossip is the stream half of the membership protocol. Its version rises when old and new nodes must not form
	// one list of members.
	ProtoGossip = "quay-gossip/1"
	// ProtoHTTP is HTTP/2, ProtoHTTP1 HTTP/1.1; both reach Listener.HTTP.
	ProtoHTTP  = "h2"
	ProtoHTTP1 = "http/1.1"
)

// nodeName is the one DNS name in every leaf, and the server name of every client: nodes are told apart by their keys,
// never by names, so the check of the name that TLS insists on is made to always hold and the chain alone decides.
// .internal is reserved for private use and resolves nowhere.
const nodeName = "node.docker-quay.internal"

var (
	// Validity of the authority and of leaves. A leaf lives as long as its process and the authority as long as its
	// secret, so an end would only ever shut out a member; a century is "always" in a field that must be filled.
	notBefore = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
	notAfter  = time.Date(2120, 1, 1, 0, 0, 0, 0, time.UTC)

	// judgedAt is the moment at which certificates are checked, whatever the machine's clock says: boards without a
	// battery start in 1970, and virtual machines wake up years late.
	judgedAt = time.Date(2070, 1, 1, 0, 0, 0, 0, time.UTC)
)

// ErrForeign is the error for a peer that does not hold the secret; see Foreign.
var ErrForeign = errors.New("not a member of this cluster: it has another cluster secret, or none")

// Identity is one process's membership: the cluster's authority and a leaf of its own. It is immutable and safe for
// concurrent use.
type Identity struct {
	id    string
	leaf  tls.Certificate
	roots *x509.CertPool
}

// Identity derives the cluster's authority and issues a leaf with a fresh key: every call makes a new node ID.
func (s Secret) Identity() (*Identity, error) {
	caKey := ed25519.NewKeyFromSeed(s.derive(labelCA, ed25519.SeedSize))
	ca, err := authority(caKey)
	if err != nil {
		return nil, err
	}
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("cannot make a node key: %w", err)
	}
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("cannot make a node key: %w", err)
	}
	id := nodeID(spki)
	serial := new(big.Int).SetBytes(s.serialFor(spki))
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: id},
		NotBefore:    notBefore,
		NotAfter:     notAfter,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:     []string{nodeName},
	}, ca, pub, caKey)
	if err != nil {
		return nil, fmt.Errorf("cannot issue the node's certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("cannot issue the node's certificate: %w", err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	return &Identity{
		id:    id,
		leaf:  tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf},
		roots: roots,
	}, nil
}

// serialFor makes a serial number of 127 bits that is unique per key, as RFC 5280 wants of an authority.
func (s Secret) serialFor(spki []byte) []byte {
	sum := sha256.Sum256(spki)
	sum[0] &= 0x7f // positive
	sum[0] |= 0x40 // and of fixed length
	return sum[:16]
}

// authority makes the cluster's root certificate. Everything in it is fixed or derived, and Ed25519 signatures are
// deterministic, so every node makes the same bytes. It is never sent: both ends already have it.
func authority(key ed25519.PrivateKey) (*x509.Certificate, error) {
	pub := key.Public().(ed25519.PublicKey)
	keyID := sha256.Sum256(pub)
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "docker quay cluster"},
		NotBefore:             notBefore,
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
		// Named here because the library's own choice has changed between Go releases.
		SubjectKeyId: keyID[:20],
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, pub, key)
	if err != nil {
		return nil, fmt.Errorf("cannot derive the cluster's authority: %w", err)
	}
	ca, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("cannot derive the cluster's authority: %w", err)
	}
	return ca, nil
}

// ID is this node's ID: 32 hexadecimal digits, the first 16 bytes of the SHA-256 of the leaf's public key (SPKI).
func (i *Identity) ID() string { return i.id }

// Client is the configuration for connections to other members that will speak proto. A handshake with anything that
// is not a member, or does not speak proto, fails. Each call returns a new configuration; keep its ServerName.
func (i *Identity) Client(proto string) *tls.Config {
	c := i.config(proto)
	c.ServerName = nodeName
	c.RootCAs = i.roots
	return c
}

// Server is the configuration for connections from other members that speak one of protos, in order of preference. A
// client without a certificate of this cluster fails its handshake. Each call returns a new configuration.
func (i *Identity) Server(protos ...string) *tls.Config {
	c := i.config(protos...)
	c.ClientAuth = tls.RequireAndVerifyClientCert
	c.ClientCAs = i.roots
	return c
}

func (i *Identity) config(protos ...string) *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{i.leaf},
		MinVersion:   tls.VersionTLS13, // older versions show certificates in clear and may be downgraded
		NextProtos:   slices.Clone(protos),
		Time:         func() time.Time { return judgedAt },
		// A ticket would let a connection start without a certificate being shown again, outlive a change of the
		// secret in a running peer, and be dated by the fixed clock. Handshakes are few and cost about a millisecond a side.
		SessionTicketsDisabled: true,
		// Bulk data: full records from the first byte on.
		DynamicRecordSizingDisabled: true,
		// The library has verified the chain by now. This makes sure that it did, whatever an option or a future default
		// might change, and that no protocol is spoken that was not agreed on.
		VerifyConnection: func(cs tls.ConnectionState) error {
			if _, err := PeerID(cs); err != nil {
				return err
			}
			if !slices.Contains(protos, cs.NegotiatedProtocol) {
				return fmt.Errorf("the peer speaks none of the protocols %q", protos)
			}
			return nil
		},
	}
}

// PeerID is the node ID of the other end of a connection, from the certificate whose chain was verified in the
// handshake. The error wraps ErrForeign when there was none.
func PeerID(cs tls.ConnectionState) (string, error) {
	if len(cs.VerifiedChains) == 0 || len(cs.VerifiedChains[0]) == 0 {
		return "", fmt.Errorf("the peer is %w", ErrForeign)
	}
	return nodeID(cs.VerifiedChains[0][0].RawSubjectPublicKeyInfo), nil
}

// Foreign reports whether a failed handshake (client or server side) shows that the peer is not of this cluster, or that
// the peer found us not to be of its own: the user then has two different secrets in use.
func Foreign(err error) bool {
	var bad *tls.CertificateVerificationError
	if errors.Is(err, ErrForeign) || errors.As(err, &bad) {
		return true
	}
	// crypto/tls has no exported type for an alert that was received; this is how it wraps and words them.
	var op *net.OpError
	if !errors.As(err, &op) || op.Op != "remote error" {
		return false
	}
	switch op.Err.Error() {
	case "tls: bad certificate", "tls: unknown certificate authority", "tls: certificate required":
		return true
	}
	return false
}

func nodeID(spki []byte) string {
	sum := sha256.Sum256(spki)
	return hex.EncodeToString(sum[:16])
}
