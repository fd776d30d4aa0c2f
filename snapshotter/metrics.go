package snapshotter

import (
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/docker-quay/docker-quay/fetcher"
)

// metrics turns what a fetcher counts into Prometheus metrics, when they are asked
// for. No label names a blob, an image or a node: docker quay peers does.
type metrics struct {
	stats func() fetcher.Stats
}

var _ prometheus.Collector = metrics{}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("quay_"+name, help, labels, nil)
}

var (
	descMembers     = desc("members", "Other nodes of the cluster that answer.")
	descSwarms      = desc("swarms", "Blobs that this node fetches or shares.")
	descFetches     = desc("fetches", "Blobs that this node fetches.")
	descKept        = desc("keeper_blobs", "Blobs whose list of holders this node keeps.")
	descConnections = desc("connections", "Open connections with other nodes.", "kind")
	descFetched     = desc("fetched_bytes_total", "Bytes of blobs by where they came from; cache: they were here when somebody asked for the blob.", "source")
	descUploaded    = desc("uploaded_bytes_total", "Bytes of blobs given to other nodes.")
	descLeases      = desc("leases", "Segments of 4 MiB lent to this node, to get them from the registry.")
	descAsked       = desc("lease_requests_total", "How often this node asked for segments.")
	descLeased      = desc("leases_total", "Segments that were lent to this node.")
	descDemand      = desc("demand_read_seconds", "Time until bytes were here that somebody waited for, by where they came from.", "source")
	descFailed      = desc("demand_reads_failed_total", "Reads that somebody waited for and that failed.")
	descHedges      = desc("hedges_total", "Reads for which a second source was asked, since the first took too long.")
	descBans        = desc("bans_total", "How often a peer was banned from a blob.", "reason")
	descWrong       = desc("wrong_pieces_total", "Pieces from peers that were not what they should be.")
	descControl     = desc("control_bytes_total", "Bytes of messages between nodes that are no part of blobs.", "direction")
	descPauses      = desc("registry_pauses_total", "How often a registry asked the cluster for patience.")
	descPaused      = desc("registries_paused", "Registries that are left alone for now, as they asked.")
)

// Describe implements prometheus.Collector.
func (m metrics) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(m, ch) }

// Collect implements prometheus.Collector.
func (m metrics) Collect(ch chan<- prometheus.Metric) {
	s := m.stats()
	gauge := func(d *prometheus.Desc, v int, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v), labels...)
	}
	total := func(d *prometheus.Desc, v int64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	histogram := func(d *prometheus.Desc, h fetcher.Histogram, labels ...string) {
		buckets := make(map[float64]uint64, len(h.Buckets))
		for i, n := range h.Buckets {
			buckets[fetcher.DemandBuckets[i]] = n
		}
		ch <- prometheus.MustNewConstHistogram(d, h.Count, h.Sum, buckets, labels...)
	}
	gauge(descMembers, s.Members)
	gauge(descSwarms, s.Swarms)
	gauge(descFetches, s.Fetches)
	gauge(descKept, s.Kept)
	gauge(descConnections, s.SwarmConnections, "swarm")
	gauge(descConnections, s.ConnectionsIn, "http-in")
	gauge(descConnections, s.ConnectionsOut, "http-out")
	total(descFetched, s.FromOrigin, "origin")
	total(descFetched, s.FromPeers, "peer")
	total(descFetched, s.FromCache, "cache")
	total(descUploaded, s.Uploaded)
	gauge(descLeases, s.Leases)
	total(descAsked, s.LeaseRequests)
	total(descLeased, s.Leased)
	histogram(descDemand, s.DemandPeers, "peer")
	histogram(descDemand, s.DemandOrigin, "origin")
	total(descFailed, s.DemandFailed)
	total(descHedges, s.Hedges)
	reasons := make([]string, 0, len(s.Bans))
	for r := range s.Bans {
		reasons = append(reasons, string(r))
	}
	slices.Sort(reasons)
	for _, r := range reasons {
		total(descBans, s.Bans[fetcher.BanReason(r)], r)
	}
	total(descWrong, s.WrongPieces)
	total(descControl, s.ControlSent, "out")
	total(descControl, s.ControlReceived, "in")
	total(descPauses, s.RegistryPauses)
	gauge(descPaused, s.RegistriesPaused)
}
