package snapshotter

import (
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/docker-quay/docker-quay/snapshotter/blobfs"
	"github.com/docker-quay/docker-quay/snapshotter/layerfs"
	"github.com/docker-quay/docker-quay/snapshotter/layerstore"
	"github.com/docker-quay/docker-quay/snapshotter/lazy/lazytest"
)

// fixed collects what does not change.
type fixed struct {
	*layerMetrics
	counts layerfs.Counts
	layers []layerfs.Layer
}

func (f fixed) Collect(ch chan<- prometheus.Metric) { collectLayers(ch, f.counts, f.layers) }

// TestLayerMetrics: what a scrape says of layers, under names and types as Prometheus has them, and no more for more layers.
func TestLayerMetrics(t *testing.T) {
	f := fixed{counts: layerfs.Counts{
		Mounts: 5, Data: 2, Present: 10, Bytes: 4096, Errors: 1, InFlight: 3, MountFailures: 4, Equal: 6, Forged: 1, Uncompared: 2, Quota: 1 << 30,
	}}
	f.counts.Waits = blobfs.Histogram{Count: 2, Sum: 1.5}
	f.counts.Waits.Buckets[len(blobfs.WaitBuckets)-1] = 1
	f.layers = []layerfs.Layer{
		{State: layerfs.Lazy, Report: layerstore.Report{Size: 1000, Present: 10, OnDisk: 20}},
		{State: layerfs.Lazy, Report: layerstore.Report{Size: 2000, Present: 20, OnDisk: 30}},
		{State: layerfs.Complete, Report: layerstore.Report{Size: 300, Present: 300, OnDisk: 400}},
	}
	got := scrape(t, f)
	for _, want := range []string{
		`quay_layers{state="lazy"} 2`, `quay_layers{state="unchecked"} 0`, `quay_layers{state="complete"} 1`, `quay_layers{state="forged"} 0`,
		"quay_layers_size_bytes 3300", "quay_layers_present_bytes 330", "quay_layers_disk_bytes 450", "quay_layers_quota_bytes 1.073741824e+09",
		`quay_layer_mounts{data="file"} 2`, `quay_layer_mounts{data="daemon"} 3`, "quay_layer_mount_failures_total 4",
		`quay_layer_reads_total{kind="present"} 10`, `quay_layer_reads_total{kind="waited"} 2`, "quay_layer_read_bytes_total 4096",
		"quay_layer_read_errors_total 1", "quay_layer_reads_waiting 3",
		`quay_layer_read_wait_seconds_bucket{le="30"} 1`, `quay_layer_read_wait_seconds_bucket{le="+Inf"} 2`, "quay_layer_read_wait_seconds_sum 1.5",
		`quay_layer_index_compares_total{result="equal"} 6`, `quay_layer_index_compares_total{result="forged"} 1`,
		`quay_layer_index_compares_total{result="failed"} 2`,
	} {
		if !slices.Contains(got, want) {
			t.Errorf("the scrape lacks %s", want)
		}
	}
	if len(got) != layerSeries {
		t.Errorf("%d series, want %d", len(got), layerSeries)
	}
	r := prometheus.NewRegistry()
	if err := r.Register(f); err != nil {
		t.Fatal(err)
	}
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if total := strings.HasSuffix(f.GetName(), "_total"); total != (f.GetType().String() == "COUNTER") || f.GetHelp() == "" {
			t.Errorf("%s is a %s: %q", f.GetName(), f.GetType(), f.GetHelp())
		}
	}
}

// layerSeries is how many there are, however many layers: single ones, and a histogram with its buckets, sum and count.
const layerSeries = 19 + len(blobfs.WaitBuckets) + 3

// scrape is what a collector says, without comments.
func scrape(t *testing.T, c prometheus.Collector) (series []string) {
	t.Helper()
	r := prometheus.NewRegistry()
	if err := r.Register(c); err != nil {
		t.Fatal(err)
	}
	w := httptest.NewRecorder()
	promhttp.HandlerFor(r, promhttp.HandlerOpts{}).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	for line := range strings.Lines(w.Body.String()) {
		if !strings.HasPrefix(line, "#") {
			series = append(series, strings.TrimSpace(line))
		}
	}
	return series
}

// TestLayerStatus: what is told of a layer while it comes, and when it is there.
func TestLayerStatus(t *testing.T) {
	img := lazytest.NewImage()
	part, want := layerOf(t, lazytest.EStargz, "part")
	img.Add(part)
	let := img.Hold()
	r := newEROFS(t, img)
	m := new(layerMetrics)
	if n := len(scrape(t, m)); n != 0 {
		t.Errorf("%d series before there is a file system", n)
	}
	m.serve(r.layers)
	one := func() layerfs.Layer {
		t.Helper()
		all := r.layers.Layers()
		if len(all) != 1 || all[0].Blob != part.Desc.Digest {
			t.Fatalf("layers: %+v", all)
		}
		return all[0]
	}
	r.layer("part", "", part)
	if l := one(); l.State != layerfs.Lazy || l.Present >= l.Size || l.Mounts != 1 || l.Data != 0 || l.Opens != 1 || l.Image == "" || l.Why == "" {
		t.Errorf("at first: %+v", l)
	}
	at := mountsBelow(t, filepath.Join(r.root, "snapshots"))[0]
	if b, err := os.ReadFile(filepath.Join(at, "part")); err != nil || string(b) != want {
		t.Error(err)
	}
	if c := r.layers.Counts(); c.Waits.Count == 0 || c.Waits.Sum <= 0 || c.Bytes < uint64(len(want)) || c.Errors != 0 {
		t.Errorf("after all was read: %+v", c)
	}
	let()
	eventually(t, func() bool { l := one(); return l.State == layerfs.Complete && l.Data == 1 && l.Opens == 0 })
	if l := one(); l.Present != l.Size || l.Size < int64(len(want)) || l.OnDisk < l.Size || l.Why != "" {
		t.Errorf("when complete: %+v", l)
	}
	if n := len(scrape(t, m)); n != layerSeries {
		t.Errorf("%d series, want %d", n, layerSeries)
	}
}
