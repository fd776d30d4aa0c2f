package snapshotter

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/docker-quay/docker-quay/snapshotter/blobfs"
	"github.com/docker-quay/docker-quay/snapshotter/layerfs"
)

// layerMetrics turns what is known of layers that are mounted as EROFS into Prometheus metrics, when they are asked for.
// Before there are any, and in every other way to mount, there is nothing to collect. No label names a layer:
// docker quay status does.
type layerMetrics struct {
	layers atomic.Pointer[layerfs.FileSystem]
}

var _ prometheus.Collector = (*layerMetrics)(nil)

// serve names the file system; nil is none.
func (m *layerMetrics) serve(f *layerfs.FileSystem) { m.layers.Store(f) }

var (
	descLayers       = desc("layers", "Layers that can be mounted; lazy: bytes of them are missing, unchecked: their index is still to be compared.", "state")
	descLayerSize    = desc("layers_size_bytes", "Contents of these layers' files.")
	descLayerPresent = desc("layers_present_bytes", "Of these, bytes that are here.")
	descLayerDisk    = desc("layers_disk_bytes", "What these layers take on disk.")
	descLayerQuota   = desc("layers_quota_bytes", "The most that they may take; 0 is no bound.")
	descMounts       = desc("layer_mounts", "Mounts of layers by what they read from; file: a plain file, daemon: this process.", "data")
	descMountFailed  = desc("layer_mount_failures_total", "Mounts of layers that failed.")
	descReads        = desc("layer_reads_total", "Reads of layers' data that this process answered; present: the bytes were here, waited: they came.", "kind")
	descReadBytes    = desc("layer_read_bytes_total", "Bytes of these answers.")
	descReadErrors   = desc("layer_read_errors_total", "Reads of layers' data that failed: a container got EIO.")
	descReadsWaiting = desc("layer_reads_waiting", "Reads of layers' data that wait now.")
	descReadWait     = desc("layer_read_wait_seconds", "Time until such a read was answered that had to wait.")
	descCompares     = desc("layer_index_compares_total", "Indexes of others that were compared with their layers; failed: it could not be done, and is tried again.", "result")
)

// Describe implements prometheus.Collector.
func (m *layerMetrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		descLayers, descLayerSize, descLayerPresent, descLayerDisk, descLayerQuota, descMounts, descMountFailed, descReads,
		descReadBytes, descReadErrors, descReadsWaiting, descReadWait, descCompares,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *layerMetrics) Collect(ch chan<- prometheus.Metric) {
	f := m.layers.Load()
	if f == nil {
		return
	}
	collectLayers(ch, f.Counts(), f.Layers())
}

func collectLayers(ch chan<- prometheus.Metric, c layerfs.Counts, layers []layerfs.Layer) {
	gauge := func(d *prometheus.Desc, v int64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v), labels...)
	}
	total := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	states := map[layerfs.State]int64{}
	var size, present, disk int64
	for _, l := range layers {
		states[l.State]++
		size, present, disk = size+l.Size, present+l.Present, disk+l.OnDisk
	}
	for _, s := range layerfs.States {
		gauge(descLayers, states[s], string(s))
	}
	gauge(descLayerSize, size)
	gauge(descLayerPresent, present)
	gauge(descLayerDisk, disk)
	gauge(descLayerQuota, c.Quota)
	gauge(descMounts, int64(c.Data), "file")
	gauge(descMounts, int64(c.Mounts-c.Data), "daemon")
	total(descMountFailed, uint64(c.MountFailures))
	total(descReads, c.Present, "present")
	total(descReads, c.Waits.Count, "waited")
	total(descReadBytes, c.Bytes)
	total(descReadErrors, c.Errors)
	gauge(descReadsWaiting, int64(c.InFlight))
	buckets := make(map[float64]uint64, len(c.Waits.Buckets))
	for i, n := range c.Waits.Buckets {
		buckets[blobfs.WaitBuckets[i]] = n
	}
	ch <- prometheus.MustNewConstHistogram(descReadWait, c.Waits.Count, c.Waits.Sum, buckets)
	total(descCompares, uint64(c.Equal), "equal")
	total(descCompares, uint64(c.Forged), "forged")
	total(descCompares, uint64(c.Uncompared), "failed")
}
