package image

import (
	"archive/tar"
	"os"
	"testing"
)

// TestApps: what the images are made of fits together. Making them takes Debian's packages, which no test here fetches.
func TestApps(t *testing.T) {
	names := map[string]bool{}
	for _, a := range Apps() {
		t.Run(a.Name, func(t *testing.T) {
			if names[a.Name] {
				t.Error("the name is there twice")
			}
			names[a.Name] = true
			if found, err := FindApp(a.Name); err != nil || found.Name != a.Name {
				t.Errorf("found %q, %v", found.Name, err)
			}
			if body, err := a.body(); err != nil || (a.file != "") != (len(body) > 0) {
				t.Errorf("its file %q has %d bytes, %v", a.file, len(body), err)
			}
			// With Debian's own.
			if layers := 1 + len(a.layerNames()); layers < 3 {
				t.Errorf("%d layers", layers)
			}
			if (a.First.Line == "") == (a.First.Port == 0) || (a.First.Port != 0) != (a.First.Body != "") {
				t.Errorf("its first output is told by neither or by both: %+v", a.First)
			}
			if len(a.packages) == 0 || len(a.config.Cmd) == 0 {
				t.Errorf("nothing to install or to run: %+v", a)
			}
		})
	}
	if _, err := FindApp("cobol"); err == nil {
		t.Error("found a program that there is not")
	}
	a := App{layers: []appLayer{{name: "rest"}, {"modules", []string{"usr/lib/modules/"}}, {"data", []string{"usr/lib/modules/data/", "srv/"}}}}
	for name, want := range map[string]int{
		"usr/bin/x": 0, "usr/lib": 0, "usr/lib/modules": 1, "usr/lib/modules/x": 1, "usr/lib/modules/data/x": 2, "srv": 2, "srv/.wh.x": 2,
	} {
		if got := a.layerOf(name); got != want {
			t.Errorf("%s goes into layer %d, not %d", name, got, want)
		}
	}
}

// TestFiles: the same numbers give the same image, whose files are of the sizes that were asked for.
func TestFiles(t *testing.T) {
	const big, small = 1 << 20, 120
	first, err := Files(t.Context(), t.TempDir(), Gzip, big, small)
	if err != nil {
		t.Fatal(err)
	}
	second, err := Files(t.Context(), t.TempDir(), Gzip, big, small)
	if err != nil {
		t.Fatal(err)
	}
	if first.Manifest.Digest != second.Manifest.Digest {
		t.Errorf("the same input gave %s and %s", first.Manifest.Digest, second.Manifest.Digest)
	}
	files := 0
	for i, layer := range first.Layers {
		tree, err := first.readLayer(layer)
		if err != nil {
			t.Fatal(err)
		}
		size := int64(0)
		for name, e := range tree {
			if e.Header.Typeflag != tar.TypeReg {
				continue
			}
			files++
			size += e.Header.Size
			if i == 0 && (name != BigFile || e.Header.Size != big) || i == 1 && (e.Header.Size < 512 || e.Header.Size > 16<<10) {
				t.Errorf("%s has %d bytes", name, e.Header.Size)
			}
		}
		if info, err := os.Stat(first.Path(layer.Digest)); err != nil || info.Size() < size/3 || info.Size() > size {
			t.Errorf("%d bytes of files are compressed to %v, %v", size, info, err)
		}
	}
	if files != small+1 {
		t.Errorf("%d files, not %d", files, small+1)
	}
}
