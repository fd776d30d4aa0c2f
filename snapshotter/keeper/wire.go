package keeper

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// A message is one packet of a SOCK_SEQPACKET socket:
//
//	"QK" version code text
//
// To the keeper, code is an op and text a name; put carries one file. From the keeper,
// code is a status and text is the names (separated by NUL) or the error; an answer to
// get carries one file. Nothing of it may change while version stays.
const (
	version    = 1
	headerSize = 4
	// messageSize holds the longest message, all names in one answer.
	messageSize = headerSize + MaxFiles*(maxName+1)
)

const (
	opPut byte = iota + 1
	opGet
	opDrop
	opList
)

const (
	statusOK byte = iota
	statusExists
	statusAbsent
	statusFull
	statusBad // the message makes no sense, or the file is missing
)

// errMalformed tells of a message that is none.
var errMalformed = errors.New("not a message of this version of the keeper's protocol")

// message is one packet, decoded. Whoever receives one owns its file, a bare
// descriptor: an os.File of a FUSE connection that does not block would be watched by
// the runtime's poller, and wake the keeper for each request.
type message struct {
	code byte
	text string
	fd   int // none when there is none
}

const none = -1

// parse decodes a packet's bytes.
func parse(p []byte) (message, error) {
	if len(p) < headerSize || len(p) > messageSize || p[0] != 'Q' || p[1] != 'K' || p[2] != version {
		return message{fd: none}, errMalformed
	}
	return message{code: p[3], text: string(p[headerSize:]), fd: none}, nil
}

// send writes m as one packet.
func send(c *net.UnixConn, m message) error {
	p := append([]byte{'Q', 'K', version, m.code}, m.text...)
	var rights []byte
	if m.fd != none {
		rights = unix.UnixRights(m.fd)
	}
	_, _, err := c.WriteMsgUnix(p, rights, nil)
	return err
}

// receive reads one packet. What a stranger sends along beyond one file is closed.
func receive(c *net.UnixConn) (message, error) {
	// One byte more than the longest message, to notice a longer one; room for a few
	// files more than one, so that the kernel need not cut what we want to close.
	p := make([]byte, messageSize+1)
	oob := make([]byte, unix.CmsgSpace(8*4))
	n, on, _, _, err := c.ReadMsgUnix(p, oob)
	fds := descriptors(oob[:on])
	if err != nil || n == 0 {
		closeAll(fds)
		if err == nil {
			err = net.ErrClosed // an empty packet is the end of the connection
		}
		return message{fd: none}, err
	}
	m, err := parse(p[:n])
	if err == nil && len(fds) > 1 {
		err = errMalformed
	}
	if err != nil {
		closeAll(fds)
		return message{fd: none}, err
	}
	if len(fds) == 1 {
		m.fd = fds[0]
	}
	return m, nil
}

// descriptors takes the files out of a packet's control messages.
func descriptors(oob []byte) []int {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	var l []int
	for _, m := range msgs {
		if fds, err := unix.ParseUnixRights(&m); err == nil {
			l = append(l, fds...)
		}
	}
	return l
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// duplicate gives another descriptor of fd, that is closed on exec.
func duplicate(fd int) (int, error) {
	d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, firstFD)
	if err != nil {
		return none, fmt.Errorf("a stored file cannot be duplicated: %w", err)
	}
	return d, nil
}

// withFD calls do with f's descriptor. (Fd would make f block.)
func withFD(f *os.File, do func(fd int) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) { err = do(int(fd)) })
	return errors.Join(cerr, err)
}

// names decodes the text of an answer to list.
func names(text string) []string {
	if text == "" {
		return nil
	}
	return strings.Split(text, "\x00")
}

// check makes an error of an answer's status.
func (m message) check(name string) error {
	switch m.code {
	case statusOK:
		return nil
	case statusExists:
		return fmt.Errorf("the keeper holds %q already: %w", name, fs.ErrExist)
	case statusAbsent:
		return fmt.Errorf("the keeper does not hold %q: %w", name, fs.ErrNotExist)
	case statusFull:
		return fmt.Errorf("the keeper cannot take %q: %w", name, ErrFull)
	}
	return fmt.Errorf("the keeper refused the call for %q: %s", name, bytes.ToValidUTF8([]byte(m.text), nil))
}

// allowed tells whether the process at the other end of c is root's or our own user's.
func allowed(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(cerr, err); err != nil {
		return fmt.Errorf("the keeper's socket does not tell who is at its other end: %w", err)
	}
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("user %d is at the other end of the keeper's socket, not root or user %d", cred.Uid, os.Geteuid())
	}
	return nil
}
