package image

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// filesRecipe changes whenever the same sizes must give another image.
const filesRecipe = "files 1"

// What an image of files has to read: one large file, and small ones in folders.
const (
	BigFile    = "data/big"
	SmallFiles = "data/small"
)

// smallPerFolder is about what folders of a package hold.
const smallPerFolder = 50

// Files is an image of two layers for reading: a file of big bytes, and as many small ones as told, of 0.5 to 16 KiB, most of them
// short. Half of the bytes are (pseudo-)random, so that the layers compress by about that. The same numbers give the same image.
func Files(ctx context.Context, cache string, format Format, big, small int) (*Image, error) {
	name := fmt.Sprintf("files-%d-%d-%s-%s", big, small, recipe(filesRecipe), format)
	dir, err := cached(ctx, cache, name, func(_ context.Context, dir string) error {
		l := &layout{dir: dir}
		if err := l.addFiles(format, big, small); err != nil {
			return err
		}
		return l.finish(ocispec.ImageConfig{Env: environment, Cmd: []string{"/none"}})
	})
	if err != nil {
		return nil, err
	}
	return Load(dir)
}

// Stock is Files with busybox below, so that containers run in it; its command does nothing, for an hour.
func Stock(ctx context.Context, cache string, format Format, big, small int) (*Image, error) {
	binary, applets, err := busybox(ctx)
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("stock-%d-%d-%s-%s", big, small, recipe(filesRecipe, busyboxRecipe, digest.FromBytes(binary).String()), format)
	dir, err := cached(ctx, cache, name, func(_ context.Context, dir string) error {
		l := &layout{dir: dir}
		programs, base := busyboxTrees(binary, applets)
		if err := l.addTree(programs, format, "busybox"); err != nil {
			return err
		}
		if err := l.addTree(base, format, "base files"); err != nil {
			return err
		}
		if err := l.addFiles(format, big, small); err != nil {
			return err
		}
		return l.finish(ocispec.ImageConfig{Env: environment, Cmd: []string{"/bin/sleep", "3600"}})
	})
	if err != nil {
		return nil, err
	}
	return Load(dir)
}

// addFiles adds the two layers of Files. What is in them is the same every time.
func (l *layout) addFiles(format Format, big, small int) error {
	random := rand.New(rand.NewPCG(uint64(big), uint64(small)))
	one, many := Tree{}, Tree{}
	one.AddFile(BigFile, 0o644, halfRandom(random, big))
	for i := range small {
		// Of the order of 2^9 to 2^14, each as likely.
		size := 512<<random.IntN(5) + random.IntN(512)
		many.AddFile(fmt.Sprintf("%s/%03d/%05d", SmallFiles, i/smallPerFolder, i), 0o644, halfRandom(random, size))
	}
	if err := l.addTree(one, format, "a large file"); err != nil {
		return err
	}
	return l.addTree(many, format, "small files")
}

// halfRandom is n bytes, in turns of 16 random and 16 equal ones.
func halfRandom(random *rand.Rand, n int) []byte {
	p := make([]byte, 0, n+32)
	same := []byte(strings.Repeat("=", 16))
	for len(p) < n {
		p = binary.LittleEndian.AppendUint64(p, random.Uint64())
		p = binary.LittleEndian.AppendUint64(p, random.Uint64())
		p = append(p, same...)
	}
	return p[:n]
}
