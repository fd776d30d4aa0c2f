package swarm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/anacrolix/torrent/metainfo"
	"github.com/anacrolix/torrent/storage"
)

// pieceStorage is what the library sees of a Torrent's Storage.
//
// The library calls Completion under its lock, and the rest without. A piece is marked in SelfHash, not in MarkComplete: the
// library ignores an error of the latter and would announce the piece all the same. Completion is answered from
// the Torrent's own record, so the Storage is never called under the library's lock.
type pieceStorage struct{ t *Torrent }

var (
	_ storage.ClientImpl  = pieceStorage{}
	_ storage.PieceImpl   = piece{}
	_ storage.SelfHashing = piece{}
)

func (p pieceStorage) OpenTorrent(context.Context, *metainfo.Info, metainfo.Hash) (storage.TorrentImpl, error) {
	return storage.TorrentImpl{
		Piece: func(m metainfo.Piece) storage.PieceImpl { return piece{p.t, m.Index()} },
		Close: func() error { return nil },
	}, nil
}

// piece is one piece of a Torrent; offsets are within it.
type piece struct {
	t *Torrent
	i int
}

func (p piece) offset() int64 { return int64(p.i) * p.t.pieceSize }

// Completion is always known, so the library never hashes to find out.
func (p piece) Completion() storage.Completion {
	return storage.Completion{Ok: true, Complete: p.t.has(p.i)}
}

func (p piece) ReadAt(b []byte, off int64) (int, error) {
	if !p.t.enter() {
		return 0, fs.ErrClosed
	}
	defer p.t.leave()
	if !p.t.has(p.i) {
		return 0, fmt.Errorf("piece %d of %s is not held", p.i, p.t.digest)
	}
	return p.t.st.ReadAt(b, p.offset()+off)
}

func (p piece) WriteAt(b []byte, off int64) (int, error) {
	if !p.t.enter() {
		return 0, fs.ErrClosed
	}
	defer p.t.leave()
	if p.t.has(p.i) {
		return len(b), nil
	}
	n, err := p.t.st.WriteAt(b, p.offset()+off)
	if err != nil && p.t.st.Has(p.i) {
		// The piece came by other means since; that is no trouble.
		return len(b), nil
	}
	return n, err
}

// SelfHash is called when all chunks of the piece are written, and stands for checking it: it offers the piece to the
// Storage and gives the placeholder hash that the library expects if the Storage took it. With an error the library
// blames no peer; it would blame IP addresses, which many nodes may share.
func (p piece) SelfHash() (metainfo.Hash, error) {
	t := p.t
	if !t.enter() {
		return metainfo.Hash{}, fs.ErrClosed
	}
	defer t.leave()
	if !t.st.Has(p.i) {
		peers := t.takeSuppliers(p.i)
		err := t.st.MarkPiece(p.i, joinSuppliers(peers))
		switch {
		case errors.Is(err, ErrBadPiece):
			t.s.log.Warn("a piece from peers has the wrong content and is fetched again",
				"blob", t.digest, "piece", p.i, "peers", joinSuppliers(peers), "error", err)
			if len(peers) == 1 {
				t.Ban(nodeOf(peers[0].peer))
			}
			return metainfo.Hash{}, err
		case errors.Is(err, ErrPutOff):
			return metainfo.Hash{}, err
		case err != nil:
			t.fail(err)
			return metainfo.Hash{}, err
		}
	}
	t.setHave(p.i)
	return pieceHash(t.hashSeed, p.i), nil
}

func (piece) MarkComplete() error    { return nil }
func (piece) MarkNotComplete() error { return nil }
