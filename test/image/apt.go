package image

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// source is one line of apt's one-line format (sources.list(5)).
type source struct {
	options string // "[signed-by=…]" or empty
	uri     string
	suite   string
	parts   []string
}

func (s source) String() string {
	return strings.Join(append(strings.Fields("deb "+s.options+" "+s.uri+" "+s.suite), s.parts...), " ")
}

// debianSources are those of the machine's apt sources that offer this release of Debian itself: the mirror is the machine's
// business. Sources of others (their suites or components have other names) stay out of the image.
func debianSources(etc, codename string) ([]source, error) {
	var all []source
	paths, err := filepath.Glob(filepath.Join(etc, "sources.list.d", "*"))
	if err != nil {
		return nil, err
	}
	for _, path := range append([]string{filepath.Join(etc, "sources.list")}, paths...) {
		raw, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read apt's sources: %w", err)
		}
		switch filepath.Ext(path) {
		case ".list":
			all = append(all, oneLineSources(raw)...)
		case ".sources":
			all = append(all, deb822Sources(raw)...)
		}
	}
	var ours []source
	for _, s := range all {
		release := s.suite == codename || strings.HasPrefix(s.suite, codename+"-") || strings.HasPrefix(s.suite, codename+"/")
		for _, part := range s.parts {
			if release && part == "main" {
				s.parts = []string{"main"}
				ours = append(ours, s)
				break
			}
		}
	}
	if len(ours) == 0 {
		return nil, fmt.Errorf("apt's sources in %s offer no Debian %s main", etc, codename)
	}
	return ours, nil
}

// oneLineSources reads the format of sources.list.
func oneLineSources(raw []byte) []source {
	var sources []source
	lines := bufio.NewScanner(bytes.NewReader(raw))
	for lines.Scan() {
		line, _, _ := strings.Cut(lines.Text(), "#")
		kind, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		if kind != "deb" {
			continue
		}
		s := source{}
		rest = strings.TrimSpace(rest)
		if strings.HasPrefix(rest, "[") {
			options, after, _ := strings.Cut(rest, "]")
			s.options, rest = options+"]", after
		}
		fields := strings.Fields(rest)
		if len(fields) < 3 {
			continue
		}
		s.uri, s.suite, s.parts = fields[0], fields[1], fields[2:]
		sources = append(sources, s)
	}
	return sources
}

// deb822Sources reads the format of *.sources: paragraphs of fields, whose lists mean every combination.
func deb822Sources(raw []byte) []source {
	var sources []source
	for _, paragraph := range strings.Split(strings.ReplaceAll(string(raw), "\r\n", "\n"), "\n\n") {
		field, last := map[string]string{}, ""
		for _, line := range strings.Split(paragraph, "\n") {
			switch name, value, ok := strings.Cut(line, ":"); {
			case strings.HasPrefix(line, "#"):
			case strings.HasPrefix(line, " ") || strings.HasPrefix(line, "\t"):
				field[last] += "\n" + strings.TrimSpace(line)
			case ok:
				last = strings.ToLower(name)
				field[last] = strings.TrimSpace(value)
			}
		}
		if !strings.Contains(" "+field["types"]+" ", " deb ") || field["enabled"] == "no" {
			continue
		}
		options := ""
		// A key inside the file itself cannot be named on one line: mmdebstrap then uses the machine's keyrings.
		if key := field["signed-by"]; strings.HasPrefix(key, "/") {
			options = "[signed-by=" + strings.Join(strings.Fields(key), ",") + "]"
		}
		for _, uri := range strings.Fields(field["uris"]) {
			for _, suite := range strings.Fields(field["suites"]) {
				sources = append(sources, source{options: options, uri: uri, suite: suite, parts: strings.Fields(field["components"])})
			}
		}
	}
	return sources
}

// aptOptions are the machine's settings of how to reach the mirrors (proxies, retries), as options of mmdebstrap.
func aptOptions(ctx context.Context) ([]string, error) {
	out, err := exec.CommandContext(ctx, "apt-config", "dump", "Acquire").Output()
	if err != nil {
		return nil, fmt.Errorf("read apt's configuration: %w", err)
	}
	var options []string
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSpace(line)
		name, value, _ := strings.Cut(line, " ")
		if value == `"";` {
			continue
		}
		for _, prefix := range []string{"Acquire::http::", "Acquire::https::", "Acquire::Retries"} {
			if strings.HasPrefix(strings.ToLower(name), strings.ToLower(prefix)) {
				options = append(options, "--aptopt="+line)
			}
		}
	}
	return options, nil
}
