package image

import "testing"

// TestNasty: the image is the same every time, in each format.
func TestNasty(t *testing.T) {
	for _, f := range Formats {
		t.Run(f.String(), func(t *testing.T) {
			first, err := Nasty(t.Context(), t.TempDir(), f)
			if err != nil {
				t.Fatal(err)
			}
			second, err := Nasty(t.Context(), t.TempDir(), f)
			if err != nil {
				t.Fatal(err)
			}
			if first.Manifest.Digest != second.Manifest.Digest {
				t.Errorf("the same input gave %s and %s", first.Manifest.Digest, second.Manifest.Digest)
			}
			if len(first.Layers) != 4 {
				t.Errorf("%d layers, not 4", len(first.Layers))
			}
		})
	}
}
