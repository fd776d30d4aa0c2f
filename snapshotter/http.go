package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// headerTimeout bounds the head of a request: a client on this node sends it at
// once, anybody else should not hold a connection.
const headerTimeout = 10 * time.Second

// httpService is an HTTP handler on a TCP address.
type httpService struct {
	name string
	srv  *http.Server
	l    net.Listener
}

var _ Service = (*httpService)(nil)

// newHTTPService listens on addr. key is the configuration's, for the error; what is the log's name.
func newHTTPService(what, key, addr string, h http.Handler) (*httpService, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("the %s cannot be served (%s): %w", what, key, err)
	}
	return &httpService{
		name: fmt.Sprintf("%s on http://%s", what, l.Addr()),
		srv:  &http.Server{Handler: h, ReadHeaderTimeout: headerTimeout},
		l:    l,
	}, nil
}

// newMetrics serves the process's Prometheus registry, and what is collected, on /metrics.
func newMetrics(addr string, collected ...prometheus.Collector) (*httpService, error) {
	own := prometheus.NewRegistry()
	for _, c := range collected {
		if err := own.Register(c); err != nil {
			return nil, fmt.Errorf("the metrics cannot be served: %w", err)
		}
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(prometheus.Gatherers{prometheus.DefaultGatherer, own}, promhttp.HandlerOpts{}))
	return newHTTPService("metrics", "metrics.listen", addr, mux)
}

// Name implements Service.
func (s *httpService) Name() string { return s.name }

// Serve implements Service.
func (s *httpService) Serve() error {
	if err := s.srv.Serve(s.l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Shutdown implements Service. Requests still in progress when ctx ends are cut.
func (s *httpService) Shutdown(ctx context.Context) error {
	defer s.l.Close() // when Serve was never called
	if err := s.srv.Shutdown(ctx); err != nil {
		return s.srv.Close()
	}
	return nil
}
