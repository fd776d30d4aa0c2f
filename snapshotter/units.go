package snapshotter

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// units of sizes, largest first within each kind, so that a size is written back
// in the largest binary unit that divides it.
var units = []struct {
	name  string
	bytes float64
}{
	{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10},
	{"TB", 1e12}, {"GB", 1e9}, {"MB", 1e6}, {"kB", 1e3},
	{"B", 1},
}

// Size is a number of bytes, written with a unit: "50GiB", "1.5TB", "0".
type Size int64

// Rate is a number of bytes in a second, written as a Size, with or without "/s".
type Rate int64

// Duration is a time, written as "2s" or "1m30s".
type Duration time.Duration

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil {
		return fmt.Errorf("%q is no time: write a number and a unit, such as \"2s\"", text)
	}
	*d = Duration(v)
	return nil
}

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Size) UnmarshalText(text []byte) error {
	n, ok := parseSize(string(text))
	if !ok {
		return fmt.Errorf("%q is no size: write a number and a unit, such as \"50GiB\" or \"500MB\", or \"0\"", text)
	}
	*s = Size(n)
	return nil
}

// MarshalText implements encoding.TextMarshaler.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// String writes the size in the largest binary unit that divides it.
func (s Size) String() string {
	for _, u := range units[:4] {
		if n := int64(u.bytes); s != 0 && int64(s)%n == 0 {
			return strconv.FormatInt(int64(s)/n, 10) + u.name
		}
	}
	if s == 0 {
		return "0"
	}
	return strconv.FormatInt(int64(s), 10) + "B"
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (r *Rate) UnmarshalText(text []byte) error {
	n, ok := parseSize(strings.TrimSuffix(string(text), "/s"))
	if !ok {
		return fmt.Errorf("%q is no rate: write bytes per second with a unit, such as \"100MiB\", or \"0\" for no limit", text)
	}
	*r = Rate(n)
	return nil
}

// MarshalText implements encoding.TextMarshaler.
func (r Rate) MarshalText() ([]byte, error) { return []byte(Size(r).String()), nil }

func parseSize(text string) (int64, bool) {
	text = strings.TrimSpace(text)
	if text == "0" {
		return 0, true
	}
	for _, u := range units {
		number, ok := strings.CutSuffix(text, u.name)
		if !ok {
			continue
		}
		v, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
		if n := v * u.bytes; err == nil && n >= 0 && n < math.MaxInt64 {
			return int64(n), true
		}
		return 0, false
	}
	return 0, false
}
