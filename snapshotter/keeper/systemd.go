package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// fdPrefix marks our names among those that systemd holds for the unit.
const fdPrefix = "quay."

// firstFD is where systemd puts the files it hands over (sd_listen_fds(3)).
const firstFD = 3

// Systemd is the Store in systemd's file descriptor store (sd_pid_notify_with_fds(3)):
// the unit says NotifyAccess=main, FileDescriptorStoreMax= and, to keep the files while
// the unit is stopped, FileDescriptorStorePreserve=yes. systemd hands files over when
// it starts the process only, so this one has all of them open as well.
type Systemd struct {
	socket string
	mu     sync.Mutex     // guards following
	files  map[string]int // descriptors
}

var _ Store = (*Systemd)(nil)

// NewSystemd takes what systemd handed to this process; call it once, early. It fails
// with an error that is errors.ErrUnsupported when systemd did not start the process.
// Whether the unit has a store shows at the first Put.
func NewSystemd() (*Systemd, error) { return adopt(firstFD) }

// adopt takes the files from descriptor first on.
func adopt(first int) (*Systemd, error) {
	socket := os.Getenv("NOTIFY_SOCKET")
	if socket == "" || (socket[0] != '/' && socket[0] != '@') {
		return nil, fmt.Errorf("systemd gave no notify socket, is NotifyAccess= set in the unit? %w", errors.ErrUnsupported)
	}
	s := &Systemd{socket: socket, files: map[string]int{}}
	if os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) {
		return s, nil
	}
	n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil || n < 0 || n > 4096 {
		return nil, fmt.Errorf("systemd's LISTEN_FDS=%q is no number of files", os.Getenv("LISTEN_FDS"))
	}
	for i, name := range strings.Split(os.Getenv("LISTEN_FDNAMES"), ":") {
		if i >= n {
			break
		}
		unix.CloseOnExec(first + i)
		name, ours := strings.CutPrefix(name, fdPrefix)
		if _, twice := s.files[name]; !ours || checkName(name) != nil || twice {
			continue
		}
		s.files[name] = first + i
	}
	// Neither a second call nor a child of ours shall take these numbers for files.
	for _, e := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		os.Unsetenv(e)
	}
	return s, nil
}

// Put implements Store. systemd does not say whether it took the file; that it has
// looked at it is all that is known. FDPOLL=0 has it keep also what reports an error.
func (s *Systemd) Put(ctx context.Context, name string, f *os.File) error {
	if err := checkName(name); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, have := s.files[name]; have {
		return fmt.Errorf("systemd holds %q already: %w", name, fs.ErrExist)
	}
	if len(s.files) >= MaxFiles {
		return fmt.Errorf("systemd shall not hold %q as well: %w", name, ErrFull)
	}
	return withFD(f, func(fd int) error {
		d, err := duplicate(fd)
		if err != nil {
			return err
		}
		if err := s.notify(ctx, "FDSTORE=1\nFDPOLL=0\nFDNAME="+fdPrefix+name, d); err != nil {
			unix.Close(d)
			return err
		}
		s.files[name] = d
		return nil
	})
}

// Get implements Store.
func (s *Systemd) Get(_ context.Context, name string) (*os.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fd, have := s.files[name]
	if !have {
		return nil, fmt.Errorf("systemd does not hold %q: %w", name, fs.ErrNotExist)
	}
	d, err := duplicate(fd)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(d), name), nil
}

// Drop implements Store.
func (s *Systemd) Drop(ctx context.Context, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	fd, have := s.files[name]
	if !have {
		return fmt.Errorf("systemd does not hold %q: %w", name, fs.ErrNotExist)
	}
	if err := s.notify(ctx, "FDSTOREREMOVE=1\nFDNAME="+fdPrefix+name, none); err != nil {
		return err
	}
	delete(s.files, name)
	return unix.Close(fd)
}

// List implements Store.
func (s *Systemd) List(context.Context) ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.files)), nil
}

// Close implements Store.
func (s *Systemd) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for n, fd := range s.files {
		unix.Close(fd)
		delete(s.files, n)
	}
	return nil
}

// notify sends a message and waits until systemd has worked through it: it closes the
// pipe of a BARRIER=1 only after all that came before (since systemd 246; older ones
// close it at once, as a file that they did not ask for).
func (s *Systemd) notify(ctx context.Context, text string, fd int) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unixgram", s.socket)
	if err != nil {
		return fmt.Errorf("systemd's notify socket %s cannot be reached: %w", s.socket, err)
	}
	u := conn.(*net.UnixConn)
	defer u.Close()
	if t, ok := ctx.Deadline(); ok {
		u.SetDeadline(t)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	err = sendText(u, text, fd)
	if err == nil {
		err = withFD(w, func(fd int) error { return sendText(u, "BARRIER=1", fd) })
	}
	w.Close()
	if err != nil {
		return fmt.Errorf("systemd's notify socket %s does not take a message: %w", s.socket, err)
	}
	defer context.AfterFunc(ctx, func() { r.SetReadDeadline(time.Unix(1, 0)) })()
	if _, err := io.Copy(io.Discard, r); err != nil {
		return fmt.Errorf("systemd does not work through the message %q: %w", text, errors.Join(err, ctx.Err()))
	}
	return nil
}

// sendText sends one datagram, with a file unless fd is none.
func sendText(u *net.UnixConn, text string, fd int) error {
	var rights []byte
	if fd != none {
		rights = unix.UnixRights(fd)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return err
	}
	// WriteMsgUnix refuses a datagram socket that is connected.
	werr := raw.Write(func(s uintptr) bool {
		err = unix.Sendmsg(int(s), []byte(text), rights, nil, unix.MSG_NOSIGNAL)
		return err != unix.EAGAIN && err != unix.EINTR
	})
	return errors.Join(werr, err)
}
