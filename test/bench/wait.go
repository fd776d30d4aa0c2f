package bench

import (
	"context"
	"time"
)

// Wait waits for d, or returns the error of a context that ends before.
func Wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Pass says whether what was asked of docker quay was met.
func Pass(met bool) string {
	if met {
		return "met"
	}
	return "NOT MET"
}
