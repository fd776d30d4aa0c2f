package cluster

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/fetcher/trust"
)

const (
	// maxStatements bounds how many statements one answer holds, and maxPieces how
	// many pieces one of them or one question speaks of: a window of the swarm.
	maxStatements = 512
	maxPieces     = 512
	// statementLabel separates these signatures from any others by the same key.
	statementLabel = "piece table v1"
)

// PieceSum is the SHA-256 of one piece.
type PieceSum [sha256.Size]byte

// Statement is a part of a piece table: what the signer says some pieces of a
// blob contain, because it got them from the registry or has checked the whole
// blob. Any member may pass it on. When the blob's digest later shows that it was
// false, it proves who lied.
type Statement struct {
	// Pieces are piece numbers, rising; Sums their SHA-256 in the same order.
	Pieces []int      `json:"pieces"`
	Sums   []PieceSum `json:"-"`
	// Raw holds the Sums one after the other: a third of their size in JSON.
	Raw []byte `json:"sums"`
	// By is the signer's node ID; Key and Signature prove it, see trust.Verify.
	By        string `json:"by"`
	Key       []byte `json:"key"`
	Signature []byte `json:"sig"`
}

// Sign makes a statement of this node's about pieces of a blob, in rising order.
func Sign(id *trust.Identity, d digest.Digest, size int64, pieces []int, sums []PieceSum) Statement {
	s := Statement{Pieces: pieces, Sums: sums, By: id.ID(), Key: id.PublicKey()}
	for _, sum := range sums {
		s.Raw = append(s.Raw, sum[:]...)
	}
	s.Signature = id.Sign(statementLabel, s.message(d, size))
	return s
}

// Verify reports whether the node named in By said this of the blob.
func (s *Statement) Verify(d digest.Digest, size int64) bool {
	return trust.Verify(s.By, s.Key, statementLabel, s.message(d, size), s.Signature)
}

// message is what is signed.
func (s *Statement) message(d digest.Digest, size int64) []byte {
	b := make([]byte, 0, len(d)+16+len(s.Pieces)*(8+sha256.Size))
	b = append(b, d...)
	b = append(b, 0)
	b = binary.BigEndian.AppendUint64(b, uint64(size))
	for _, i := range s.Pieces {
		b = binary.BigEndian.AppendUint64(b, uint64(i))
	}
	return append(b, s.Raw...)
}

// validStatements checks the form of statements and takes their sums apart.
func validStatements(said []Statement) error {
	if len(said) > maxStatements {
		return fmt.Errorf("%w: %d statements", ErrMessage, len(said))
	}
	for k := range said {
		s := &said[k]
		if len(s.Pieces) == 0 || len(s.Pieces) > maxPieces || len(s.Raw) != len(s.Pieces)*sha256.Size ||
			len(s.By) > maxNodeID || len(s.Key) != trust.PublicKeySize || len(s.Signature) != trust.SignatureSize {
			return fmt.Errorf("%w: statement about %d pieces with %d bytes of sums", ErrMessage, len(s.Pieces), len(s.Raw))
		}
		s.Sums = make([]PieceSum, len(s.Pieces))
		for i := range s.Pieces {
			if s.Pieces[i] < 0 || i > 0 && s.Pieces[i] <= s.Pieces[i-1] {
				return fmt.Errorf("%w: statement whose pieces are out of order", ErrMessage)
			}
			copy(s.Sums[i][:], s.Raw[i*sha256.Size:])
		}
	}
	return nil
}

type statementsQuery struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`
	Pieces []int         `json:"pieces"`
}

func (q *statementsQuery) validate() error {
	if err := q.Digest.Validate(); err != nil {
		return fmt.Errorf("%w: %v", ErrMessage, err)
	}
	if q.Size < 0 || q.Size > maxBlobSize || len(q.Pieces) > maxPieces {
		return fmt.Errorf("%w: question about %d pieces of %d bytes", ErrMessage, len(q.Pieces), q.Size)
	}
	for _, i := range q.Pieces {
		if i < 0 || int64(i) >= q.Size {
			return fmt.Errorf("%w: piece %d of %d bytes", ErrMessage, i, q.Size)
		}
	}
	return nil
}
