package image

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// randomRecipe changes whenever the same size must give another image.
const randomRecipe = "random 1"

// A tar of one file is that file between its header and two empty blocks, each padded to 512 bytes.
const (
	tarBlock    = 512
	tarOverhead = 3 * tarBlock
)

// Random is an image of one or more uncompressed layers of exactly size bytes each, a multiple of 512, that hold a file of
// (pseudo-)random bytes each: nothing on the way can compress or share them. The same size and count give the same image.
func Random(ctx context.Context, cache string, size int64, layers int) (*Image, error) {
	if size <= tarOverhead || size%tarBlock != 0 || layers < 1 {
		return nil, fmt.Errorf("a random image has 1 layer or more of a multiple of %d bytes above %d, not %d of %d", tarBlock, tarOverhead, layers, size)
	}
	name := fmt.Sprintf("random-%d-%d-%s", size, layers, recipe(randomRecipe))
	dir, err := cached(ctx, cache, name, func(_ context.Context, dir string) error {
		l := &layout{dir: dir}
		path := filepath.Join(dir, "layer.tar")
		for i := range layers {
			if err := writeRandom(path, size, byte(i)); err != nil {
				return err
			}
			if err := l.addLayer(path, Tar, fmt.Sprintf("random bytes %d", i)); err != nil {
				return err
			}
		}
		if err := os.Remove(path); err != nil {
			return err
		}
		return l.finish(ocispec.ImageConfig{Env: environment, Cmd: []string{"/none"}})
	})
	if err != nil {
		return nil, err
	}
	return Load(dir)
}

func writeRandom(path string, size int64, seed byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	out := tar.NewWriter(f)
	body := size - tarOverhead
	header := &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("random%d", seed), Mode: 0o644, Size: body, ModTime: Epoch}
	if err := out.WriteHeader(header); err != nil {
		return err
	}
	// A small buffer would make a system call of every tar block.
	source := rand.NewChaCha8([32]byte{seed})
	if _, err := io.CopyBuffer(out, io.LimitReader(source, body), make([]byte, 1<<20)); err != nil {
		return err
	}
	if err := out.Close(); err != nil {
		return err
	}
	return f.Close()
}
