package open

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/anacrolix/torrent/metainfo"
	"github.com/anacrolix/torrent/storage"
)

// pieceStorage is what the library sees of a Torrent's Storage: metainfo pieces.
//
// The library calls Completion under its lock, and the rest without. It hashes a piece by ReadAt when all its chunks are written, which
// is how it finds out who sent a wrong one, and calls MarkComplete when the hash is right. It ignores errors of that; so a piece
// that the Storage did not take is given up by Torrent.run soon after.
type pieceStorage struct{ t *Torrent }

var (
	_ storage.ClientImpl = pieceStorage{}
	_ storage.PieceImpl  = piece{}
)

func (p pieceStorage) OpenTorrent(context.Context, *metainfo.Info, metainfo.Hash) (storage.TorrentImpl, error) {
	return storage.TorrentImpl{
		Piece: func(m metainfo.Piece) storage.PieceImpl { return piece{p.t, m.Index()} },
		Close: func() error { return nil },
	}, nil
}

// piece is one metainfo piece of a Torrent; offsets are within it.
type piece struct {
	t *Torrent
	j int
}

// errNotThere is what the library gets for a piece that is not whole. It blames no peer for it.
var errNotThere = errors.New("the piece is not there")

// Completion is always known, so the library never hashes to find out.
func (p piece) Completion() storage.Completion {
	p.t.mu.Lock()
	defer p.t.mu.Unlock()
	return storage.Completion{Ok: true, Complete: p.t.ended == nil && p.t.pieces.complete(p.j)}
}

func (p piece) ReadAt(b []byte, off int64) (int, error) {
	t := p.t
	if !t.enter() {
		return 0, fs.ErrClosed
	}
	defer t.leave()
	t.mu.Lock()
	state, buf := t.pieces.state[p.j], t.pieces.bufs[p.j]
	t.mu.Unlock()
	start, n := t.pieces.metaRange(p.j)
	if off >= n {
		return 0, io.EOF
	}
	b = b[:min(int64(len(b)), n-off)]
	switch {
	case state == held:
		if err := t.prove(p.j); err != nil {
			return 0, err
		}
		return t.st.ReadAt(b, start+off)
	case buf != nil:
		return buf.read(b, off)
	}
	return 0, fmt.Errorf("piece %d of torrent %s: %w", p.j, t.infohash, errNotThere)
}

func (p piece) WriteAt(b []byte, off int64) (int, error) {
	t := p.t
	if !t.enter() {
		return 0, fs.ErrClosed
	}
	defer t.leave()
	t.mu.Lock()
	buf := t.pieces.fill(p.j)
	t.mu.Unlock()
	if buf == nil { // it came by other means since
		return len(b), nil
	}
	return buf.write(b, off)
}

// MarkComplete is called when the piece matched its SHA-1.
func (p piece) MarkComplete() error {
	if !p.t.enter() {
		return fs.ErrClosed
	}
	defer p.t.leave()
	p.t.passed(p.j)
	return nil
}

// MarkNotComplete is called when it did not.
func (p piece) MarkNotComplete() error {
	p.t.mu.Lock()
	defer p.t.mu.Unlock()
	if p.t.pieces.state[p.j] == filling {
		p.t.pieces.reset(p.j)
	}
	return nil
}
