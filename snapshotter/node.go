package snapshotter

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/api"
	"github.com/docker-quay/docker-quay/fetcher/mirror"
	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/fetcher/trust"
)

// Node is what the daemon runs beside the snapshotter: the fetcher, and what is
// served from it.
type Node struct {
	Layers   LayerSource          // where layers come from; nil: every layer is unpacked
	Services []Service            // mirror and node API, listening already
	Metrics  prometheus.Collector // of the fetcher
	// Mounts has the node API tell of the snapshotter's layers, once there is one.
	Mounts func(*Server)
	// Tell has other nodes told of the content of layers.
	Tell  func(fetcher.IndexFunc)
	Close func(ctx context.Context) error // after the services and the snapshotter are down; may be nil
}

// NewNode builds the fetcher of cfg, and what is served from it. When it fails nothing is
// left running.
func NewNode(ctx context.Context, cfg Config, version string, log *slog.Logger) (_ *Node, err error) {
	var closers []func() error
	closeAll := func(context.Context) error {
		var errs []error
		for _, c := range slices.Backward(closers) {
			errs = append(errs, c())
		}
		return errors.Join(errs...)
	}
	defer func() {
		if err != nil {
			closeAll(ctx)
		}
	}()

	secret, err := loadSecret(cfg.Peers.SecretFile, log)
	if err != nil {
		return nil, err
	}
	st, err := store.Open(store.Options{Dir: filepath.Join(cfg.Root, "store"), Quota: int64(cfg.Store.Quota), Log: log})
	if err != nil {
		return nil, err
	}
	closers = append(closers, st.Close)
	clients, err := newClients(cfg.Origin, version, log)
	if err != nil {
		return nil, err
	}
	closers = append(closers, clients.checked.Close, clients.insecure.Close)
	advertise, _ := netip.ParseAddrPort(cfg.Peers.Advertise) // Validate knows "" and what parses
	f, err := fetcher.New(ctx, fetcher.Options{
		Store: st, Log: log, Secret: secret,
		Listen: cfg.Peers.Listen, Ports: cfg.Peers.Ports, Advertise: advertise, Peers: cfg.Peers.Peers,
		Zone: cfg.Peers.Zone, LocalDiscovery: cfg.Peers.Discovery,
		UploadRate: int64(cfg.Limits.Upload), DownloadRate: int64(cfg.Limits.Download), NoSeed: !cfg.Peers.Seed,
		Open:              openOptions(cfg.Torrents),
		UploadRatePerBlob: int64(cfg.Limits.UploadPerBlob), DownloadRatePerBlob: int64(cfg.Limits.DownloadPerBlob),
		Connections: cfg.Limits.Connections, ConnectionsPerBlob: cfg.Limits.ConnectionsPerBlob,
		Reach:  fetcher.Reach(cfg.Origin.Reach),
		Behalf: &origin.Options{HostDirs: cfg.Origin.HostDirs, Own: cfg.Origin.Insecure, UserAgent: "docker-quay/" + version},
	})
	if err != nil {
		return nil, err
	}
	closers = append(closers, f.Close)
	layers := NewLayers(f, clients.of, log)
	var mounts atomic.Pointer[Server]
	services, err := serve(cfg, version, log, f, clients, layers, &mounts)
	if err != nil {
		return nil, err
	}
	return &Node{
		Layers: layers, Services: services, Metrics: metrics{f.Stats}, Close: closeAll,
		Mounts: mounts.Store,
		Tell:   f.OfferIndexes,
	}, nil
}

// serve opens the mirror and the node API over a fetcher.
func serve(cfg Config, version string, log *slog.Logger, f *fetcher.Fetcher, c *clients, layers *Layers, mounts *atomic.Pointer[Server]) ([]Service, error) {
	var services []Service
	if cfg.Mirror.Listen != "" {
		m, err := newHTTPService("registry mirror", "mirror.listen", cfg.Mirror.Listen, mirror.New(mirror.Options{
			Fetcher: f, Origin: c.of, Offline: cfg.Origin.Offline, Log: log,
			// Runtimes run as root; who else is on this machine uses the node API, with credentials of their own.
			Allow: mirror.LocalUsers(0, os.Getuid()),
		}))
		if err != nil {
			return nil, err
		}
		services = append(services, m)
	}
	// 0660: what the API gives, the registry allowed to whoever asks.
	l, err := Listen(cfg.API.Socket, 0o660, cfg.API.Group)
	if err != nil {
		return nil, errors.Join(err, shutdownAll(services)(context.Background()))
	}
	return append(services, newAPIService(l, api.NewServer(api.ServerOptions{
		Fetcher: f, Log: log, Opened: layers.Opened,
		Origin: func(req api.ImageRequest) (*origin.Client, error) {
			return c.with(req.Credential, req.Insecure, version, log)
		},
		Status: func() api.Status {
			st := api.Status{
				Version: version, NodeID: f.NodeID(), Peers: f.Members(),
				Snapshotter: cfg.Snapshotter.Socket, Mirror: cfg.Mirror.Listen,
			}
			if a := f.Addr(); a.IsValid() {
				st.Addr = a.String()
			}
			st.Store, _ = f.Store().Usage()
			st.Fetcher = fetching(f.Stats())
			if sn := mounts.Load(); sn != nil {
				st.Layers = sn.Layers()
			}
			return st
		},
		Layers: func() []api.Layer {
			if sn := mounts.Load(); sn != nil {
				return sn.eachLayer()
			}
			return nil
		},
	}))), nil
}

// fetching is what the node API tells of a fetcher's counts.
func fetching(s fetcher.Stats) api.Fetching {
	return api.Fetching{
		Fetches: s.Fetches, Shared: s.Swarms,
		FromOrigin: s.FromOrigin, FromPeers: s.FromPeers, FromCache: s.FromCache, Uploaded: s.Uploaded,
		FailedReads: s.DemandFailed, RegistriesPaused: s.RegistriesPaused,
	}
}

// openOptions are the node's part in open BitTorrent swarms; nil when it has none.
func openOptions(cfg TorrentsConfig) *fetcher.OpenOptions {
	use := fetcher.TorrentPolicy(cfg.Use)
	if use == fetcher.TorrentsNever {
		return nil
	}
	return &fetcher.OpenOptions{Use: use, Listen: cfg.Listen, Ports: cfg.Ports, Public: cfg.DHT}
}

// apiService is the node API on its unix socket.
type apiService struct {
	l      net.Listener
	api    *api.Server
	ctx    context.Context
	cancel context.CancelFunc
}

func newAPIService(l net.Listener, s *api.Server) *apiService {
	ctx, cancel := context.WithCancel(context.Background())
	return &apiService{l: l, api: s, ctx: ctx, cancel: cancel}
}

// Name implements Service.
func (s *apiService) Name() string { return "node API on " + s.l.Addr().String() }

// Serve implements Service.
func (s *apiService) Serve() error { return s.api.Serve(s.ctx, s.l) }

// Shutdown implements Service. Requests get two seconds to end, whatever ctx says.
func (s *apiService) Shutdown(context.Context) error {
	s.cancel()
	_ = s.l.Close() // when Serve was never called
	s.api.Close()
	return nil
}

// loadSecret reads the cluster's secret; nil when there is none.
func loadSecret(path string, log *slog.Logger) (*trust.Secret, error) {
	s, err := trust.Load(path)
	if errors.Is(err, fs.ErrNotExist) {
		log.Info("no cluster secret: images come from registries only", "secret_file", path)
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return &s, nil
}

// clients ask registries with the node's own credentials.
type clients struct {
	checked, insecure *origin.Client
	hosts             []string // for insecure
	dirs              []string // of hosts.toml and certificates
}

// with returns a client that uses the credentials of somebody else, and no others.
func (c *clients) with(credential func(string) (string, string, error), insecure bool, version string, log *slog.Logger) (*origin.Client, error) {
	return origin.New(origin.Options{
		Credentials: credential, HostDirs: c.dirs, Insecure: insecure,
		UserAgent: "docker-quay/" + version, Log: log,
	})
}

func newClients(cfg OriginConfig, version string, log *slog.Logger) (*clients, error) {
	o := origin.Options{
		DockerConfigDir: cfg.DockerConfig, HostDirs: cfg.HostDirs,
		UserAgent: "docker-quay/" + version, Log: log,
	}
	checked, err := origin.New(o)
	if err != nil {
		return nil, err
	}
	o.Insecure = true
	insecure, err := origin.New(o)
	if err != nil {
		checked.Close()
		return nil, err
	}
	return &clients{checked: checked, insecure: insecure, hosts: cfg.Insecure, dirs: cfg.HostDirs}, nil
}

// of returns the client for a registry, host or host:port.
func (c *clients) of(host string) *origin.Client {
	if slices.Contains(c.hosts, host) {
		return c.insecure
	}
	return c.checked
}
