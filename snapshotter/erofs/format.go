package erofs

import "golang.org/x/sys/unix"

// The numbers of the format, from the kernel's fs/erofs/erofs_fs.h. All are
// little-endian on disk.
const (
	blockBits = 12
	blockSize = 1 << blockBits

	superOffset = 1024
	superMagic  = 0xE0F5E1E2
	// deviceOffset is right behind the 128 bytes of the superblock. It is written
	// in units of a slot.
	deviceOffset = superOffset + 128
	deviceSize   = 128
	// rootOffset is where the first inode, the root, lies. The superblock has 16 bits
	// for its number, so that it must be near the start.
	rootOffset = deviceOffset + deviceSize

	compatChecksum = 0x1 // the superblock's block has a CRC-32C
	compatMtime    = 0x2 // the inodes' time is that of modification
	incompatDevice = 0x8 // there are extra devices

	// slotSize is the unit that inode numbers count.
	slotSize  = 32
	inodeSize = 64 // of an extended inode: 32-bit owners, 64-bit size, own time

	inodeExtended = 1
	layoutPlain   = 0 << 1 // contents in consecutive blocks
	layoutInline  = 2 << 1 // the last, incomplete block right behind the inode

	direntSize = 12
	maxName    = 255
	// maxLink is the longest target that readlink(2) gives back (PATH_MAX less the NUL).
	maxLink = 4095

	xattrHeader = 12
	xattrEntry  = 4
	// maxXattrs bounds the attributes of one inode: their size is a 16-bit count of
	// units of 4 bytes.
	maxXattrs     = xattrHeader + 4*(1<<16-2)
	maxXattrName  = 255 // XATTR_NAME_MAX
	maxXattrValue = 1<<16 - 1

	// maxBlocks bounds the image and the data file together. Block addresses have 32
	// bits, and the last of them means a hole.
	maxBlocks = 1<<32 - 1

	maxMajor = 1<<12 - 1
	maxMinor = 1<<20 - 1
)

// fileType gives what a directory says of the type of a name. ok is false for a mode
// that is of no type.
func fileType(mode uint32) (t byte, ok bool) {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return 1, true
	case unix.S_IFDIR:
		return 2, true
	case unix.S_IFCHR:
		return 3, true
	case unix.S_IFBLK:
		return 4, true
	case unix.S_IFIFO:
		return 5, true
	case unix.S_IFSOCK:
		return 6, true
	case unix.S_IFLNK:
		return 7, true
	}
	return 0, false
}

// deviceNumber is the kernel's new_encode_dev.
func deviceNumber(major, minor uint32) uint32 {
	return minor&0xff | major<<8 | (minor&^0xff)<<12
}

func alignUp(n, to int64) int64 { return (n + to - 1) / to * to }
