package published

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
)

const (
	// maxDepth bounds nesting: announce lists, the deepest that is read, are at three.
	maxDepth = 8
	// maxValues bounds all values of a document. A torrent of one file with all its URLs has a hundred; this keeps 16 MiB of
	// "i0e" from becoming half a gigabyte of memory.
	maxValues = 4096
)

// value is a bencoded value (BEP 3). The slices are parts of the document.
type value struct {
	kind byte // 'i', 's', 'l', 'd'
	raw  []byte
	num  int64
	str  []byte
	list []value
	dict map[string]value
}

// decode reads one document strictly: integers in their one form, keys that are strings and come once, nothing behind the end. The
// library that downloads is more lenient and has panicked over less: what passes here holds no surprise for it.
func decode(b []byte) (value, error) {
	d := decoder{rest: b}
	v, err := d.value(0)
	if err != nil {
		return value{}, fmt.Errorf("byte %d: %w", len(b)-len(d.rest), err)
	}
	if len(d.rest) > 0 {
		return value{}, fmt.Errorf("%d bytes behind its end", len(d.rest))
	}
	return v, nil
}

type decoder struct {
	rest  []byte
	count int
}

var errCut = errors.New("it is cut short")

func (d *decoder) value(depth int) (value, error) {
	if d.count++; d.count > maxValues || depth > maxDepth {
		return value{}, fmt.Errorf("more than %d values, or nested deeper than %d", maxValues, maxDepth)
	}
	if len(d.rest) == 0 {
		return value{}, errCut
	}
	start := d.rest
	var v value
	var err error
	switch c := start[0]; {
	case c == 'i':
		d.rest = d.rest[1:]
		v.kind = 'i'
		v.num, err = d.number('e')
	case c >= '0' && c <= '9':
		v.kind = 's'
		v.str, err = d.string()
	case c == 'l', c == 'd':
		d.rest = d.rest[1:]
		v, err = d.container(c, depth)
	default:
		err = fmt.Errorf("%q begins no value", c)
	}
	v.raw = start[:len(start)-len(d.rest)]
	return v, err
}

// container reads a list or a dictionary, behind its first byte.
func (d *decoder) container(kind byte, depth int) (value, error) {
	v := value{kind: kind}
	if kind == 'd' {
		v.dict = map[string]value{}
	}
	for {
		if len(d.rest) == 0 {
			return v, errCut
		}
		if d.rest[0] == 'e' {
			d.rest = d.rest[1:]
			return v, nil
		}
		var key []byte
		if kind == 'd' {
			var err error
			if key, err = d.string(); err != nil {
				return v, err
			}
			if _, twice := v.dict[string(key)]; twice {
				return v, fmt.Errorf("the key %.40q comes twice", key)
			}
		}
		e, err := d.value(depth + 1)
		if err != nil {
			return v, err
		}
		if kind == 'd' {
			v.dict[string(key)] = e
		} else {
			v.list = append(v.list, e)
		}
	}
}

func (d *decoder) string() ([]byte, error) {
	n, err := d.number(':')
	switch {
	case err != nil:
		return nil, err
	case n < 0:
		return nil, errors.New("a string of negative length")
	case n > int64(len(d.rest)):
		return nil, errCut
	}
	s := d.rest[:n:n]
	d.rest = d.rest[n:]
	return s, nil
}

// number reads up to end, which it takes.
func (d *decoder) number(end byte) (int64, error) {
	const digits = 20 // of the longest int64 with its sign
	i := bytes.IndexByte(d.rest[:min(len(d.rest), digits+1)], end)
	if i < 0 {
		return 0, errors.New("a number without its end")
	}
	text := string(d.rest[:i])
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || text != strconv.FormatInt(n, 10) {
		return 0, fmt.Errorf("%q is not a number as BEP 3 writes them", text)
	}
	d.rest = d.rest[i+1:]
	return n, nil
}
