package e2e

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/test/rig"
)

// TestPeers: two daemons, an image pulled on one and then on the other: `docker quay peers` and a scrape of the second say where it
// came from, and the limits of the second's configuration hold.
func TestPeers(t *testing.T) {
	w := newWorld(t, 2, rig.RegistryOptions{})
	img := w.random(16*mib, 1)
	ref := w.push(img, "random", "1")
	n1, n2 := w.network.Node(1), w.network.Node(2)
	d1 := w.daemon(n1, daemonOptions{})
	const perSecond = 8 * mib
	d2 := w.daemon(n2, daemonOptions{peers: []*rig.Node{n1}, config: `
[metrics]
listen = "127.0.0.1:6870"
[limits]
download_per_blob = "8MiB"
connections = 16
cpus = 2
`})
	d2.knows(1)
	w.user(n1).uses(d1).pull("--to", "store", ref)
	u := w.user(n2).uses(d2)
	begun := time.Now()
	u.pull("--to", "store", ref)
	if took := time.Since(begun).Seconds(); took < 0.8*float64(16*mib)/perSecond {
		t.Errorf("16 MiB in %.1f s with a limit of 8 MiB/s", took)
	}

	var r fetcher.Report
	o := u.quay("peers", "--socket", d2.socket, "--format", "json", ref)
	if err := json.Unmarshal([]byte(o.stdout), &r); o.code != 0 || err != nil || len(r.Members) != 1 || len(r.Blobs) != len(img.Layers) {
		t.Fatalf("%v: %s", err, o)
	}
	for _, b := range r.Blobs {
		if b.State != fetcher.Complete || b.Have != b.Size || b.FromPeers < b.Size*9/10 || b.Keeper == "" {
			t.Errorf("%+v", b)
		}
	}
	text := u.quay("peers", "--socket", d2.socket)
	for _, want := range []string{"Node ", " at " + peer(n2), "MEMBER", peer(n1), "complete", "100%"} {
		if !strings.Contains(text.stdout, want) {
			t.Errorf("it lacks %q: %s", want, text)
		}
	}

	client := &http.Client{Transport: &http.Transport{DialContext: n2.DialContext, DisableKeepAlives: true}}
	resp, err := client.Get("http://127.0.0.1:6870/metrics")
	w.must(err)
	defer resp.Body.Close()
	scrape, err := io.ReadAll(resp.Body)
	w.must(err)
	for _, want := range []string{"quay_members 1\n", "quay_fetched_bytes_total{source=\"peer\"} 1.6", "quay_wrong_pieces_total 0\n", "quay_hedges_total "} {
		if !strings.Contains(string(scrape), want) {
			t.Errorf("the scrape lacks %q", want)
		}
	}

	w.must(d2.process.Stop())
	if o := u.quay("peers", "--socket", d2.socket); o.code != 5 || !strings.Contains(o.stderr, "no node daemon answers at "+d2.socket) {
		t.Errorf("without its daemon: %s", o)
	}
}
