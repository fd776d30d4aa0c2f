package trust

import (
	"crypto/ed25519"
	"crypto/x509"
)

// Sizes of what Sign and PublicKey return, in bytes.
const (
	PublicKeySize = ed25519.PublicKeySize
	SignatureSize = ed25519.SignatureSize
)

// labelSignature begins whatever a node signs, so that no signature of one purpose serves another. TLS 1.3 begins what
// it signs with 64 spaces, so neither can be taken for the other.
const labelSignature = "docker-quay trust v1: signed: "

// PublicKey is the key behind the node ID, as Verify takes it.
func (i *Identity) PublicKey() []byte {
	return []byte(i.leaf.PrivateKey.(ed25519.PrivateKey).Public().(ed25519.PublicKey))
}

// Sign signs msg for one purpose, named by label (no NUL in it), with the key behind the node ID: other members can pass
// the message on without being able to change it.
func (i *Identity) Sign(label string, msg []byte) []byte {
	return ed25519.Sign(i.leaf.PrivateKey.(ed25519.PrivateKey), signed(label, msg))
}

// Verify reports whether the node with the given ID signed msg under label; key is its PublicKey, which the ID vouches
// for. Whether that node is a member is another question.
func Verify(id string, key []byte, label string, msg, sig []byte) bool {
	if len(key) != PublicKeySize || len(sig) != SignatureSize {
		return false
	}
	spki, err := x509.MarshalPKIXPublicKey(ed25519.PublicKey(key))
	return err == nil && nodeID(spki) == id && ed25519.Verify(key, signed(label, msg), sig)
}

func signed(label string, msg []byte) []byte {
	b := make([]byte, 0, len(labelSignature)+len(label)+1+len(msg))
	b = append(b, labelSignature...)
	b = append(b, label...)
	b = append(b, 0)
	return append(b, msg...)
}
