package store

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	digest "github.com/opencontainers/go-digest"
)

// The test binary runs itself as a second process on the same store: childEnv names what it does, childDir where.
const (
	childEnv = "STORE_TEST_CHILD"
	childDir = "STORE_TEST_DIR"

	childSize = 40 * 64 * kib
)

func childMain(mode string) int {
	if err := child(mode, os.Getenv(childDir)); err != nil {
		fmt.Println("error", err)
		return 1
	}
	return 0
}

func child(mode, dir string) error {
	if mode == "nospace" {
		return childNoSpace(dir)
	}
	s, err := Open(Options{Dir: dir})
	if err != nil {
		return err
	}
	data, d := content(childSize)
	b, err := s.Blob(context.Background(), d, childSize)
	if err != nil {
		return err
	}
	in := bufio.NewReader(os.Stdin)
	fmt.Println("open", b.Have())
	write := func(i int) error {
		off, n := b.PieceRange(i)
		// In two parts, so that a kill may come in between.
		for _, r := range [][2]int64{{off, n / 2}, {off + n/2, n - n/2}} {
			if _, err := b.WriteAt(data[r[0]:r[0]+r[1]], r[0]); err != nil {
				return err
			}
		}
		if err := b.MarkPiece(i, Origin); err != nil {
			return err
		}
		_, err := fmt.Println("mark", i)
		return err
	}
	switch mode {
	case "fill": // forget and fill for ever, until killed
		for {
			for _, i := range rand.Perm(b.Pieces()) {
				if b.Has(i) {
					continue
				}
				if err := write(i); err != nil {
					return err
				}
			}
			if err := b.Verify(context.Background()); err != nil {
				return err
			}
			fmt.Println("complete")
			in.ReadString('\n')
		}
	case "hold": // half of it, then wait, then the rest, then wait
		for i := range b.Pieces() / 2 {
			if err := write(i); err != nil {
				return err
			}
		}
		fmt.Println("half")
		in.ReadString('\n')
		for i := b.Pieces() / 2; i < b.Pieces(); i++ {
			if err := write(i); err != nil {
				return err
			}
		}
		if err := b.Finish(context.Background(), d); err != nil {
			return err
		}
		fmt.Println("complete")
		in.ReadString('\n')
	}
	return errors.Join(b.Close(), s.Close())
}

type process struct {
	*exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

func startChild(t *testing.T, mode, dir string, attr *syscall.SysProcAttr) *process {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+mode, childDir+"="+dir)
	cmd.SysProcAttr = attr
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		if attr != nil {
			t.Skip("no namespaces for tests here:", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return &process{cmd, in, bufio.NewScanner(out)}
}

// until reads lines up to the one that begins with word and returns it.
func (p *process) until(t *testing.T, word string) string {
	t.Helper()
	for p.out.Scan() {
		if strings.HasPrefix(p.out.Text(), word) {
			return p.out.Text()
		}
		if strings.HasPrefix(p.out.Text(), "error") {
			t.Fatal("child:", p.out.Text())
		}
	}
	t.Fatalf("child ended before it said %q", word)
	return ""
}

func TestKill(t *testing.T) {
	dir := t.TempDir()
	data, d := content(childSize)
	told := make(map[int]bool)
	kills := 0
	for deadline := time.Now().Add(8 * time.Second); kills < 6 && time.Now().Before(deadline); {
		p := startChild(t, "fill", dir, nil)
		if h := p.until(t, "open"); !strings.HasSuffix(h, " "+strconv.Itoa(len(told)*64*kib)) && kills == 0 {
			t.Fatalf("child began with %q", h)
		}
		// At any moment: between marks, in a mark, in a write, in Verify.
		time.AfterFunc(time.Duration(rand.IntN(20_000))*time.Microsecond, func() { p.Process.Kill() })
		complete := false
		for p.out.Scan() {
			if n, ok := strings.CutPrefix(p.out.Text(), "mark "); ok {
				if i, err := strconv.Atoi(n); err == nil {
					told[i] = true
				}
			}
			if p.out.Text() == "complete" {
				complete = true
			}
			if strings.HasPrefix(p.out.Text(), "error") {
				t.Fatal(p.out.Text())
			}
		}
		p.Wait()
		kills++

		s := openStore(t, dir, 0)
		b := openBlob(t, s, d, childSize)
		if complete && b.Have() != childSize {
			t.Errorf("a verified blob came back with %d bytes", b.Have())
		}
		for i := range b.Pieces() {
			off, n := b.PieceRange(i)
			got := make([]byte, n)
			_, err := b.ReadAt(got, off)
			switch {
			case told[i] && !b.Has(i):
				t.Fatalf("piece %d was marked and is lost", i)
			case b.Has(i) && (err != nil || string(got) != string(data[off:off+n])):
				t.Fatalf("piece %d is held and wrong (%v)", i, err)
			case !b.Has(i) && !errors.Is(err, ErrMissing):
				t.Fatalf("piece %d is missing and read: %v", i, err)
			}
			told[i] = b.Has(i)
			if !told[i] {
				delete(told, i)
			}
		}
		if b.Have() == childSize { // begin again
			if !b.Complete() {
				if err := b.Verify(t.Context()); err != nil {
					t.Error(err)
				}
			}
			b.Close()
			if err := s.Remove(d); err != nil {
				t.Fatal(err)
			}
			clear(told)
		}
		b.Close()
		s.Close()
	}
	t.Logf("%d kills", kills)
}

func TestTwoProcesses(t *testing.T) {
	dir := t.TempDir()
	p := startChild(t, "hold", dir, nil)
	p.until(t, "half")

	data, d := content(childSize)
	waits := make(chan int, 10)
	s, err := Open(Options{Dir: dir, Quota: childSize * 2, OnWait: func(_ digest.Digest, pid int) { waits <- pid }})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()

	// While it is filled there: not here, not in time.
	ctx, cancel := context.WithTimeout(t.Context(), 150*time.Millisecond)
	defer cancel()
	_, err = s.Blob(ctx, d, childSize)
	want(t, "open while another fills", err, context.DeadlineExceeded)
	if pid := <-waits; pid != p.Process.Pid {
		t.Errorf("told that process %d fills, it is %d", pid, p.Process.Pid)
	}
	if len(waits) > 0 {
		t.Error("told more than once")
	}
	if in, err := s.Stat(d); err != nil || in.Have != childSize/2 || in.Complete {
		t.Errorf("stat: %+v, %v", in, err)
	}
	want(t, "remove", s.Remove(d), ErrInUse)
	want(t, "make room", s.MakeRoom(t.Context(), childSize*2), ErrQuota)

	// Several here wait, and find all of it.
	type result struct {
		b   *Blob
		err error
	}
	got := make(chan result)
	for range 3 {
		go func() {
			b, err := s.Blob(t.Context(), d, childSize)
			got <- result{b, err}
		}()
	}
	if pid := <-waits; pid != p.Process.Pid {
		t.Errorf("told that process %d fills, it is %d", pid, p.Process.Pid)
	}
	io.WriteString(p.in, "\n")
	p.until(t, "complete")
	var bs []*Blob
	for range 3 {
		r := <-got
		if r.err != nil {
			t.Fatal(r.err)
		}
		bs = append(bs, r.b)
		if !r.b.Complete() {
			t.Error("not complete")
		}
	}
	buf := make([]byte, childSize)
	if _, err := bs[0].ReadAt(buf, 0); err != nil || string(buf) != string(data) {
		t.Error("wrong bytes", err)
	}
	for _, b := range bs {
		b.Close()
	}
	// Complete, and open there only: shared, and not evicted.
	want(t, "remove what the other reads", s.Remove(d), ErrInUse)
	want(t, "evict what the other reads", s.MakeRoom(t.Context(), childSize*2), ErrQuota)
	io.WriteString(p.in, "\n")
	if err := p.Wait(); err != nil {
		t.Fatal(err)
	}
	if err := s.MakeRoom(t.Context(), childSize*2); err != nil {
		t.Error(err)
	}
	_, err = s.Stat(d)
	want(t, "stat of what was evicted", err, os.ErrNotExist)
}

// The process that fills is killed: the one that waits goes on with what there is.
func TestTakeOver(t *testing.T) {
	dir := t.TempDir()
	p := startChild(t, "hold", dir, nil)
	p.until(t, "half")
	data, d := content(childSize)
	waits := make(chan int, 1)
	s, err := Open(Options{Dir: dir, OnWait: func(digest.Digest, int) { waits <- 1 }})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	go func() {
		<-waits
		p.Process.Kill()
	}()
	b := openBlob(t, s, d, childSize)
	if b.Have() != childSize/2 || b.Frontier() != b.Pieces()/2 {
		t.Errorf("took over %d bytes", b.Have())
	}
	for i := b.Frontier(); i < b.Pieces(); i++ {
		put(t, b, data, i)
	}
	if err := b.Verify(t.Context()); err != nil {
		t.Error(err)
	}
	b.Close()
}

// A full disk, in a mount namespace of the child's own that goes with it.
func TestNoSpace(t *testing.T) {
	p := startChild(t, "nospace", t.TempDir(), &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	})
	for p.out.Scan() {
		line := p.out.Text()
		switch {
		case strings.HasPrefix(line, "skip"):
			t.Skip(line)
		case strings.HasPrefix(line, "error"):
			t.Error(line)
		case line == "ok":
			return
		}
	}
	t.Error("child ended early")
}

func childNoSpace(dir string) error {
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=1m"); err != nil {
		fmt.Println("skip: no tmpfs in a user namespace:", err)
		return nil
	}
	s, err := Open(Options{Dir: filepath.Join(dir, "store")})
	if err != nil {
		return err
	}
	data, d := content(childSize)
	b, err := s.Blob(context.Background(), d, childSize)
	if err != nil {
		return err
	}
	for i := range b.Pieces() {
		off, n := b.PieceRange(i)
		_, err := b.WriteAt(data[off:off+n], off)
		if err == nil {
			if err = b.MarkPiece(i, Peer); err == nil {
				continue
			}
		}
		if !errors.Is(err, ErrNoSpace) || !errors.Is(err, syscall.ENOSPC) {
			return fmt.Errorf("piece %d: %w", i, err)
		}
		if i < 2 || b.Has(i) || b.Frontier() != i || b.Have() != int64(i)*64*kib {
			return fmt.Errorf("full at piece %d, have %d", i, b.Have())
		}
		// Room again: it goes on.
		if err := syscall.Mount("none", dir, "tmpfs", syscall.MS_REMOUNT, "size=64m"); err != nil {
			return err
		}
		for ; i < b.Pieces(); i++ {
			off, n := b.PieceRange(i)
			if _, err := b.WriteAt(data[off:off+n], off); err != nil {
				return err
			}
			if err := b.MarkPiece(i, Peer); err != nil {
				return err
			}
		}
		if err := errors.Join(b.Verify(context.Background()), b.Close(), s.Close()); err != nil {
			return err
		}
		fmt.Println("ok")
		return nil
	}
	return errors.New("the disk never filled")
}
