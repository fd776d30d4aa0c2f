package bench

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// TouchMemory has the machine find n bytes of memory and gives them back at once, so that what runs next gets pages that are there.
// A virtual machine whose host takes free memory back pays for each page anew, up to 2 s of CPU for each GiB: several times what
// is measured here, and nothing that any candidate does.
func TouchMemory(n int64) error {
	const part = 256 << 20
	var parts [][]byte
	defer func() {
		for _, p := range parts {
			_ = unix.Munmap(p) // it was mapped like this
		}
	}()
	for ; n > 0; n -= part {
		p, err := unix.Mmap(-1, 0, int(min(n, part)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_POPULATE)
		if err != nil {
			return fmt.Errorf("touch %d bytes of memory: %w", n, err)
		}
		parts = append(parts, p)
	}
	return nil
}
