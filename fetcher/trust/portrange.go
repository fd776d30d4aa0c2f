package trust

import (
	"encoding"
	"fmt"
	"strconv"
	"strings"
)

// PortRange is an inclusive range of TCP ports to listen on. The zero value means any free port.
type PortRange struct {
	First, Last uint16
}

var (
	_ fmt.Stringer             = PortRange{}
	_ encoding.TextMarshaler   = PortRange{}
	_ encoding.TextUnmarshaler = (*PortRange)(nil)
)

// ParsePortRange reads "6881-6889", "6881" or "0" (any port).
func ParsePortRange(s string) (PortRange, error) {
	bad := func(why string) (PortRange, error) {
		return PortRange{}, fmt.Errorf("%q is not a port range: %s; write one like 6881-6889, 6881, or 0 for any port", s, why)
	}
	a, b, isRange := strings.Cut(s, "-")
	if !isRange {
		b = a
	}
	first, err := strconv.ParseUint(strings.TrimSpace(a), 10, 16)
	if err != nil {
		return bad("ports are numbers from 0 to 65535")
	}
	last, err := strconv.ParseUint(strings.TrimSpace(b), 10, 16)
	if err != nil {
		return bad("ports are numbers from 0 to 65535")
	}
	if last < first {
		return bad("it ends before it begins")
	}
	if first == 0 && last != 0 {
		return bad("0 stands for any port and begins no range")
	}
	return PortRange{First: uint16(first), Last: uint16(last)}, nil
}

// String is the range as ParsePortRange reads it.
func (r PortRange) String() string {
	if r.First == r.Last {
		return strconv.Itoa(int(r.First))
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// MarshalText and UnmarshalText let a range be a flag or a key of a configuration file.
func (r PortRange) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText is ParsePortRange.
func (r *PortRange) UnmarshalText(b []byte) error {
	p, err := ParsePortRange(string(b))
	if err == nil {
		*r = p
	}
	return err
}
