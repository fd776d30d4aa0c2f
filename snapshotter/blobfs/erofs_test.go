package blobfs

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// erofsOver mounts an EROFS image of one file "data" of the given size, whose bytes are
// those of device, and gives the file's path.
func erofsOver(t testing.TB, device string, size int64, options string) string {
	t.Helper()
	dir := t.TempDir()
	image, mnt := filepath.Join(dir, "image"), filepath.Join(dir, "mnt")
	if err := os.WriteFile(image, erofsImage(size), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(mnt, 0o700); err != nil {
		t.Fatal(err)
	}
	err := unix.Mount(image, mnt, "erofs", unix.MS_RDONLY, "device="+device+options)
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOTBLK) {
		t.Skipf("the kernel does not mount EROFS from files: %v", err)
	}
	if err != nil {
		t.Fatal("mount erofs:", err)
	}
	t.Cleanup(func() {
		// An EROFS waits for its reads before it ends. Where the daemon has ended first, and
		// a keeper lives, nobody answers them: so the connection is aborted.
		unix.Unmount(filepath.Dir(device), unix.MNT_FORCE|unix.UMOUNT_NOFOLLOW)
		unmount(mnt)
	})
	return filepath.Join(mnt, "data")
}

// erofsImage is the smallest image that does: a superblock with one extra device, the
// root directory, and one file of a single chunk that begins at block 0 of that device
// (fs/erofs/erofs_fs.h).
func erofsImage(size int64) []byte {
	const block, rootAt, fileAt, dirBlock = 4096, 1280, 1344, 1
	le := binary.LittleEndian
	b := make([]byte, 2*block)
	sb := b[1024:]
	le.PutUint32(sb, 0xE0F5E1E2)
	sb[12] = 12                           // blocks of 4 KiB
	le.PutUint16(sb[14:], rootAt/32)      // root inode
	le.PutUint64(sb[16:], 2)              // inodes
	le.PutUint32(sb[36:], 2)              // blocks here
	le.PutUint32(sb[80:], 0x4|0x8)        // chunked files, device table
	le.PutUint16(sb[86:], 1)              // extra devices
	le.PutUint16(sb[88:], (1024+128)/128) // where the device table begins
	slot := b[1024+128:]
	le.PutUint32(slot[64:], uint32((size+block-1)/block))
	dir := b[dirBlock*block:]
	names := []struct {
		name string
		nid  uint64
		kind byte
	}{{".", rootAt / 32, 2}, {"..", rootAt / 32, 2}, {"data", fileAt / 32, 1}}
	at := 12 * len(names)
	for i, n := range names {
		le.PutUint64(dir[12*i:], n.nid)
		le.PutUint16(dir[12*i+8:], uint16(at))
		dir[12*i+10] = n.kind
		at += copy(dir[at:], n.name)
	}
	inode := func(at int, format, mode, links uint16, size int64, where uint32) {
		i := b[at:]
		le.PutUint16(i, format)
		le.PutUint16(i[4:], mode)
		le.PutUint16(i[6:], links)
		le.PutUint32(i[8:], uint32(size))
		le.PutUint32(i[16:], where)
		le.PutUint32(i[20:], uint32(at))
	}
	inode(rootAt, 0, unix.S_IFDIR|0o755, 2, int64(at), dirBlock)
	inode(fileAt, 4<<1, unix.S_IFREG|0o444, 1, size, 0x20|18) // chunks of 1 GiB, indexed
	le.PutUint16(b[fileAt+32+2:], 1)                          // device 1, block 0
	return b
}
