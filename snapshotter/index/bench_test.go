package index

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

func cpu() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func BenchmarkBuild(b *testing.B) {
	stream := realTar(b, 120<<20)
	for _, form := range []struct {
		name string
		blob []byte
	}{{"gzip", gzipped(b, stream)}, {"zstd", zstdFrames(b, stream, 1<<20)}, {"tar", stream}} {
		for _, sink := range []bool{false, true} {
			b.Run(fmt.Sprintf("%s/sink=%v", form.name, sink), func(b *testing.B) {
				b.SetBytes(int64(len(stream)))
				before := cpu()
				desc := descOf(form.blob)
				for b.Loop() {
					var w io.WriterAt
					if sink {
						f, err := os.Create(filepath.Join(b.TempDir(), "data"))
						if err != nil {
							b.Fatal(err)
						}
						defer f.Close()
						w = f
					}
					if _, err := Build(context.Background(), bytes.NewReader(form.blob), desc, w, Options{}); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric((cpu()-before).Seconds()*1000/float64(b.N), "cpu-ms/op")
			})
		}
	}
	blob := gzipped(b, stream)
	b.Run("gzip/stdlib and sums, in order", func(b *testing.B) {
		b.SetBytes(int64(len(stream)))
		before := cpu()
		for b.Loop() {
			h := sha256.New()
			z, err := gzip.NewReader(io.TeeReader(bytes.NewReader(blob), h))
			if err != nil {
				b.Fatal(err)
			}
			d := sha256.New()
			tr := tar.NewReader(io.TeeReader(z, d))
			for {
				if _, err := tr.Next(); err != nil {
					break
				}
				io.Copy(io.Discard, tr)
			}
		}
		b.ReportMetric((cpu()-before).Seconds()*1000/float64(b.N), "cpu-ms/op")
	})
}

// What points cost, and what they save.
func BenchmarkSpacing(b *testing.B) {
	stream := realTar(b, 120<<20)
	blob := gzipped(b, stream)
	for _, spacing := range []int64{512 << 10, 1 << 20, 2 << 20, 4 << 20, 8 << 20} {
		b.Run(fmt.Sprint(spacing>>10, "KiB"), func(b *testing.B) {
			x, _ := mustBuild(b, blob, Options{Spacing: spacing})
			rnd := rand.New(rand.NewPCG(1, 2))
			var opens, read int64
			for b.Loop() {
				c := rnd.IntN(len(x.Chunks))
				if err := x.Fill(context.Background(), c, c, opener(blob, &opens, &read), func(int, []byte) error { return nil }); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(read)/float64(b.N)/1024, "KiB-read/op")
			b.ReportMetric(float64(encodedSize(b, x))*100/float64(len(blob)), "%-index")
		})
	}
}

func BenchmarkFill(b *testing.B) {
	stream := realTar(b, 120<<20)
	for name, blob := range map[string][]byte{"gzip": gzipped(b, stream), "zstd": zstdFrames(b, stream, 1<<20), "tar": stream} {
		x, _ := mustBuild(b, blob, Options{})
		b.Run(name, func(b *testing.B) {
			rnd := rand.New(rand.NewPCG(1, 2))
			var opens, read int64
			for b.Loop() {
				c := rnd.IntN(len(x.Chunks))
				if err := x.Fill(context.Background(), c, c, opener(blob, &opens, &read), func(int, []byte) error { return nil }); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(read)/float64(b.N)/1024, "KiB-read/op")
		})
	}
}
