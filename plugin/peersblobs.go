package plugin

import (
	"fmt"
	"io"
	"strings"

	"github.com/docker/cli/cli/command/formatter"
	"github.com/docker/go-units"

	"github.com/docker-quay/docker-quay/fetcher"
)

// blobFormat are the columns for a person.
const blobFormat = `table {{.Digest}}\t{{.State}}\t{{.Size}}\t{{.Have}}\t{{.Holders}}\t{{.Down}}\t{{.Up}}\t{{.Peers}}\t{{.Lent}}\t{{.Saved}}\t{{.Keeper}}\t{{.Image}}`

// blobTable writes a row for each blob.
func (opts *peersOptions) blobTable(w io.Writer, format string, r fetcher.Report) error {
	head := &blobContext{}
	head.Header = formatter.SubHeaderContext{
		"Digest": "BLOB", "State": "STATE", "Size": "SIZE", "Have": "HAVE", "Holders": "HOLDERS", "Down": "DOWN", "Up": "UP", "Rates": "RATES",
		"Peers": "PEERS", "Connections": "CONNECTED", "Lent": "LENT", "Saved": "SAVED", "Keeper": "KEEPER", "Owners": "OWNERS", "Image": "IMAGE",
	}
	c := formatter.Context{Output: w, Format: formatter.Format(format)}
	err := c.Write(head, func(add func(formatter.SubContext) error) error {
		for i := range r.Blobs {
			if err := add(&blobContext{o: opts, b: &r.Blobs[i]}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return usageError{fmt.Errorf("--format: %w", err)}
	}
	return nil
}

// blobContext is a blob as templates for a table see it.
type blobContext struct {
	formatter.HeaderContext
	o *peersOptions
	b *fetcher.BlobReport
}

func (c *blobContext) Digest() string { return c.o.digest(c.b.Digest) }

func (c *blobContext) State() string { return string(c.b.State) }

func (c *blobContext) Size() string { return units.HumanSize(float64(c.b.Size)) }

func (c *blobContext) Image() string { return orNone(printable(c.b.Image)) }

func (c *blobContext) Down() string { return rate(c.b.DownRate) }

func (c *blobContext) Up() string { return rate(c.b.UpRate) }

func (c *blobContext) Rates() string { return c.Down() + " down, " + c.Up() + " up" }

func (c *blobContext) Peers() string { return percent(c.b.PeerShare) }

// Connections is the number of nodes connected for the blob.
func (c *blobContext) Connections() int { return c.b.Connections }

// Have is the part that is here.
func (c *blobContext) Have() string {
	if c.b.Size == 0 {
		return percent(1)
	}
	return percent(float64(c.b.Have) / float64(c.b.Size))
}

// Holders is what the keeper knows, "-" when it was not asked.
func (c *blobContext) Holders() string {
	if !c.b.Known {
		return "-"
	}
	return fmt.Sprintf("%d+%d", c.b.HoldersComplete, c.b.HoldersPartial)
}

// Lent is all segments that were lent, and those of this node.
func (c *blobContext) Lent() string {
	if !c.b.Known {
		return "-"
	}
	if n := len(c.b.Leases); n > 0 {
		return fmt.Sprintf("%d (%d here)", c.b.Lent, n)
	}
	return fmt.Sprint(c.b.Lent)
}

// Saved is in copies of the blob.
func (c *blobContext) Saved() string {
	if !c.b.Known {
		return "-"
	}
	return fmt.Sprintf("%.1f", c.b.OriginCopiesSaved)
}

// Keeper is its ID.
func (c *blobContext) Keeper() string {
	if c.b.KeptHere {
		return "this node"
	}
	return orNone(c.o.id(c.b.Keeper))
}

// Owners are the IDs of those that ask the registry for reads of others.
func (c *blobContext) Owners() string {
	ids := make([]string, len(c.b.Owners))
	for i, id := range c.b.Owners {
		ids[i] = c.o.id(id)
	}
	return orNone(strings.Join(ids, ","))
}
