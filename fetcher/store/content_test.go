package store

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestContent(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, 0)
	b := []byte(`{"schemaVersion":2}`)
	for _, d := range []digest.Digest{digest.FromBytes(b), digest.SHA512.FromBytes(b)} {
		_, err := s.Content(d)
		want(t, "absent", err, fs.ErrNotExist)
		want(t, "other bytes", s.PutContent(d, b[1:]), ErrMismatch)
		for range 2 {
			if err := s.PutContent(d, b); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := s.Content(d); err != nil || string(got) != string(b) {
			t.Errorf("%q, %v", got, err)
		}
		for name, damage := range map[string][]byte{"empty": {}, "cut": b[:5], "changed": []byte("x"), "huge": make([]byte, MaxContent+1)} {
			if err := os.WriteFile(s.contentPath(d), damage, 0o600); err != nil {
				t.Fatal(err)
			}
			_, err = s.Content(d)
			want(t, name, err, fs.ErrNotExist)
			if err := s.PutContent(d, b); err != nil {
				t.Errorf("put over %s: %v", name, err)
			}
		}
	}
	huge := make([]byte, MaxContent+1)
	want(t, "huge", s.PutContent(digest.FromBytes(huge), huge), ErrTooLarge)
	if err := s.PutContent(digest.FromBytes(huge[1:]), huge[1:]); err != nil {
		t.Error("the largest:", err)
	}
	if err := s.PutContent(digest.FromBytes(nil), nil); err != nil {
		t.Error("empty:", err)
	}
	checkModes(t, dir)
}

func testRef(name string) Ref {
	return Ref{
		Name: name,
		Target: ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromString(name), Size: 123, Annotations: map[string]string{"a": "b"},
		},
		Seen:   time.Date(2026, 11, 20, 12, 0, 0, 5, time.UTC),
		Access: AccessPublic,
	}
}

func TestRefs(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, 0)
	_, err := s.Ref("docker.io/library/debian:12")
	want(t, "absent", err, fs.ErrNotExist)
	deb, alp := testRef("docker.io/library/debian:12"), testRef("docker.io/library/alpine:3")
	for _, r := range []Ref{testRef(deb.Name), deb, alp} {
		if err := s.SetRef(r); err != nil {
			t.Fatal(err)
		}
	}
	deb.Target.Digest, deb.Access = digest.FromString("moved"), "0123"
	if err := s.SetRef(deb); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Ref(deb.Name); err != nil || !reflect.DeepEqual(got, deb) {
		t.Errorf("%+v, %v", got, err)
	}
	// Files that are no refs, or not of their place, hurt nobody else.
	os.WriteFile(filepath.Join(dir, dirRefs, "x.json"), []byte("{"), 0o600)
	b, _ := os.ReadFile(s.refPath(deb.Name))
	os.WriteFile(s.refPath("other"), b, 0o600)
	_, err = s.Ref("other")
	want(t, "another's", err, fs.ErrNotExist)
	if rs, err := s.Refs(); err != nil || !reflect.DeepEqual(rs, []Ref{alp, deb}) {
		t.Errorf("%+v, %v", rs, err)
	}
	if err := s.RemoveRef(deb.Name); err != nil {
		t.Error(err)
	}
	want(t, "remove again", s.RemoveRef(deb.Name), fs.ErrNotExist)

	for name, change := range map[string]func(*Ref){
		"no name":       func(r *Ref) { r.Name = "" },
		"no digest":     func(r *Ref) { r.Target.Digest = "" },
		"md5":           func(r *Ref) { r.Target.Digest = "md5:d41d8cd98f00b204e9800998ecf8427e" },
		"negative size": func(r *Ref) { r.Target.Size = -1 },
		"huge":          func(r *Ref) { r.Target.Annotations["x"] = strings.Repeat("x", maxRef) },
	} {
		r := testRef("bad")
		change(&r)
		if s.SetRef(r) == nil {
			t.Errorf("%s: kept", name)
		}
	}
	checkModes(t, dir)
}

func FuzzParseRef(f *testing.F) {
	b, _ := json.Marshal(testRef("docker.io/library/debian:12"))
	f.Add(b)
	f.Add([]byte(`{"name":"a","target":{"digest":"sha256:../x","size":1}}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRef(b)
		if err != nil {
			if !errors.Is(err, errRef) {
				t.Errorf("error %v is not errRef", err)
			}
			return
		}
		if r.Name == "" || r.Target.Digest.Validate() != nil || r.Target.Size < 0 {
			t.Errorf("took %+v", r)
		}
	})
}
