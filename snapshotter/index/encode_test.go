package index

import (
	"bytes"
	"sync"
	"testing"
)

// TestEncodeIsTheSame: what an encoder was used for before, or is used for beside, does not show.
func TestEncodeIsTheSame(t *testing.T) {
	encode := func(x *Index) []byte {
		var b bytes.Buffer
		if err := Encode(&b, x); err != nil {
			t.Error(err)
		}
		return b.Bytes()
	}
	one := small(t)
	other, _ := mustBuild(t, gzipped(t, realTar(t, 4<<20)), Options{ChunkSize: 4096})
	first := encode(one)
	var g sync.WaitGroup
	for range 4 * encodersMost {
		g.Go(func() {
			a, b := encode(other), encode(one)
			if !bytes.Equal(b, first) || bytes.Equal(a, b) {
				t.Error("an index is encoded differently the second time")
			}
		})
	}
	g.Wait()
}
