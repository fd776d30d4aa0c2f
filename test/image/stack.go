package image

import (
	"context"
	"fmt"
	"math/rand/v2"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// stackRecipe changes whenever the same numbers must give another image.
const stackRecipe = "stack 1"

// FilesOfStack is how many files each layer of a Stack has.
const FilesOfStack = 8

// StackFile is the path of a file of a layer, both counted from 0.
func StackFile(layer, file int) string { return fmt.Sprintf("layer%03d/%d", layer, file) }

// Stack is an image of many layers, each with FilesOfStack files of its own that have size bytes together and compress to about half
// of that. Those of different seeds share nothing; the same numbers give the same image.
func Stack(ctx context.Context, cache string, format Format, layers, size, seed int) (*Image, error) {
	name := fmt.Sprintf("stack-%d-%d-%d-%s-%s", layers, size, seed, recipe(stackRecipe), format)
	dir, err := cached(ctx, cache, name, func(_ context.Context, dir string) error {
		random := rand.New(rand.NewPCG(uint64(seed), uint64(size)))
		l := &layout{dir: dir}
		for i := range layers {
			t := Tree{}
			for f := range FilesOfStack {
				t.AddFile(StackFile(i, f), 0o644, halfRandom(random, size/FilesOfStack))
			}
			if err := l.addTree(t, format, fmt.Sprintf("layer %d", i)); err != nil {
				return err
			}
		}
		return l.finish(ocispec.ImageConfig{Env: environment, Cmd: []string{"/none"}})
	})
	if err != nil {
		return nil, err
	}
	return Load(dir)
}
