package main

import (
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/docker-quay/docker-quay/test/bench/lazy/candidate"
	"github.com/docker-quay/docker-quay/test/image"
)

const (
	// passes is how often the large file is read in one turn.
	passes = 4
	// randomSize is what one random read asks for: a page.
	randomSize = 4 << 10
	// execs is how often a program is started in one turn.
	execs = 3
)

// figures are those of one turn.
type figures struct{ seq, rand, stat, small, exec float64 }

// readHot takes all figures once.
func readHot(ctx context.Context, files, program string, p picture) (f figures, err error) {
	if f.seq, err = inARow(filepath.Join(files, image.BigFile)); err != nil {
		return f, err
	}
	if f.rand, err = atRandom(filepath.Join(files, image.BigFile), p.turn); err != nil {
		return f, err
	}
	if f.stat, err = visit(files); err != nil {
		return f, err
	}
	if f.small, _, err = readAll(filepath.Join(files, image.SmallFiles)); err != nil {
		return f, err
	}
	if len(p.start) > 0 {
		f.exec, err = start(ctx, program, p.start)
	}
	return f, err
}

// inARow reads a file from its beginning to its end, some times, and returns 10^6 bytes a second.
func inARow(path string) (float64, error) {
	var n int64
	begun := time.Now()
	for range passes {
		got, err := candidate.ReadAll(path)
		if err != nil {
			return 0, err
		}
		n += got
	}
	return float64(n) / 1e6 / time.Since(begun).Seconds(), nil
}

// atRandom reads pages of a file in random order for so long and returns how many thousand a second.
func atRandom(path string, long time.Duration) (float64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	pages := info.Size() / randomSize
	if pages == 0 {
		return 0, fmt.Errorf("%s is less than a page", path)
	}
	random := rand.New(rand.NewPCG(1, 2)) // the same order every time
	fd := int(f.Fd())
	buf := make([]byte, randomSize)
	n := 0
	begun := time.Now()
	// The clock is looked at once in a while: it costs as much as a tenth of a read.
	for time.Since(begun) < long {
		for range 1000 {
			if got, err := syscall.Pread(fd, buf, random.Int64N(pages)*randomSize); err != nil || got != randomSize {
				return 0, fmt.Errorf("read a page of %s: %d bytes, %w", path, got, err)
			}
			n++
		}
	}
	return float64(n) / 1e3 / time.Since(begun).Seconds(), nil
}

// visit looks at everything below a folder, as `find -size +0` does, and returns seconds.
func visit(dir string) (float64, error) {
	begun := time.Now()
	err := filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err == nil {
			_, err = e.Info()
		}
		return err
	})
	return time.Since(begun).Seconds(), err
}

// readAll opens and reads every file below a folder, one after the other, and returns seconds and bytes.
func readAll(dir string) (seconds float64, n int64, err error) {
	begun := time.Now()
	n, err = candidate.ReadAll(dir)
	return time.Since(begun).Seconds(), n, err
}

// start runs a command with the folder as its root and returns how many milliseconds it took, on average.
func start(ctx context.Context, root string, command []string) (float64, error) {
	begun := time.Now()
	for range execs {
		cmd := exec.CommandContext(ctx, command[0], command[1:]...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Pdeathsig: syscall.SIGKILL}
		cmd.Dir = "/"
		cmd.Env = []string{"PATH=/usr/bin:/bin"}
		if out, err := cmd.CombinedOutput(); err != nil {
			return 0, fmt.Errorf("start %s in the image: %w: %s", command[0], err, out)
		}
	}
	return time.Since(begun).Seconds() * 1000 / execs, nil
}
