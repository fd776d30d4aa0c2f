package snapshotter

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/docker-quay/docker-quay/fetcher"
)

// TestMetrics: what a scrape says of a fetcher's counts, and that it says no more for
// more blobs and nodes.
func TestMetrics(t *testing.T) {
	s := fetcher.Stats{
		Members: 3, Swarms: 7, Fetches: 2, Kept: 5, SwarmConnections: 12, ConnectionsIn: 1, ConnectionsOut: 4,
		FromOrigin: 1 << 20, FromPeers: 2 << 20, FromCache: 3 << 20, Uploaded: 5 << 20,
		Leases: 2, LeaseRequests: 9, Leased: 8, DemandFailed: 1, Hedges: 6, WrongPieces: 11,
		Bans:        map[fetcher.BanReason]int64{fetcher.WrongBytes: 1, fetcher.FalseTable: 2, fetcher.Disputed: 0},
		ControlSent: 100, ControlReceived: 200, RegistryPauses: 13, RegistriesPaused: 1,
	}
	s.DemandPeers.Count, s.DemandPeers.Sum = 4, 0.5
	for i := range s.DemandPeers.Buckets {
		s.DemandPeers.Buckets[i] = 3
	}
	m, err := newMetrics("127.0.0.1:0", metrics{func() fetcher.Stats { return s }})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- m.Serve() }()
	url := "http://" + m.l.Addr().String() + "/metrics"
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatal(resp.Status, err)
	}
	http.DefaultClient.CloseIdleConnections()
	if err := m.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	lines := map[string]bool{}
	ours := 0
	for l := range strings.Lines(string(body)) {
		lines[strings.TrimSpace(l)] = true
		if strings.HasPrefix(l, "quay_") {
			ours++
		}
	}
	for _, want := range []string{
		"quay_members 3", "quay_swarms 7", "quay_fetches 2", "quay_keeper_blobs 5",
		`quay_connections{kind="swarm"} 12`, `quay_connections{kind="http-in"} 1`, `quay_connections{kind="http-out"} 4`,
		`quay_fetched_bytes_total{source="origin"} 1.048576e+06`, `quay_fetched_bytes_total{source="peer"} 2.097152e+06`,
		`quay_fetched_bytes_total{source="cache"} 3.145728e+06`,
		`quay_uploaded_bytes_total 5.24288e+06`,
		"quay_leases 2", "quay_lease_requests_total 9", "quay_leases_total 8",
		`quay_demand_read_seconds_bucket{source="peer",le="0.0005"} 3`, `quay_demand_read_seconds_bucket{source="peer",le="+Inf"} 4`,
		`quay_demand_read_seconds_sum{source="peer"} 0.5`, `quay_demand_read_seconds_count{source="origin"} 0`,
		"quay_demand_reads_failed_total 1", "quay_hedges_total 6", "quay_wrong_pieces_total 11",
		`quay_bans_total{reason="wrong-bytes"} 1`, `quay_bans_total{reason="false-table"} 2`, `quay_bans_total{reason="disputed"} 0`,
		`quay_control_bytes_total{direction="out"} 100`, `quay_control_bytes_total{direction="in"} 200`,
		"quay_registry_pauses_total 13", "quay_registries_paused 1",
	} {
		if !lines[want] {
			t.Errorf("the scrape lacks %s", want)
		}
	}
	// One series each, and two histograms with their buckets, sum and count.
	if want := 24 + 2*(len(fetcher.DemandBuckets)+3); ours != want {
		t.Errorf("%d series, want %d", ours, want)
	}
	if !strings.Contains(string(body), "go_goroutines") {
		t.Error("the process's own metrics are gone")
	}
}

// TestMetricNames: totals are counters and nothing else is (Prometheus naming conventions).
func TestMetricNames(t *testing.T) {
	ch := make(chan prometheus.Metric, 100)
	metrics{func() fetcher.Stats { return fetcher.Stats{Bans: map[fetcher.BanReason]int64{fetcher.Disputed: 1}} }}.Collect(ch)
	close(ch)
	r := prometheus.NewRegistry()
	if err := r.Register(metrics{func() fetcher.Stats { return fetcher.Stats{} }}); err != nil {
		t.Fatal(err)
	}
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		name, kind := f.GetName(), fmt.Sprint(f.GetType())
		if total := strings.HasSuffix(name, "_total"); total != (kind == "COUNTER") || f.GetHelp() == "" {
			t.Errorf("%s is a %s: %q", name, kind, f.GetHelp())
		}
	}
	if len(ch) < 24 {
		t.Errorf("%d metrics", len(ch))
	}
}
