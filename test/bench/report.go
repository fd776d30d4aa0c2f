package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"strconv"
	"strings"
	"text/tabwriter"

	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/test/rig"
)

// Quick reports whether QUICK=1 asks for a version under two minutes, with smaller inputs and the same fields.
func Quick() bool { q := os.Getenv("QUICK"); return q != "" && q != "0" }

// Report is the outcome of one benchmark. A row is a struct whose json tags are the names of the fields.
type Report[Row any] struct {
	Bench  string `json:"bench"`
	Commit string `json:"commit"`
	Kernel string `json:"kernel"`
	CPUs   int    `json:"cpus"`
	Rows   []Row  `json:"rows"`
}

// New returns a report without rows about this machine and this commit.
func New[Row any](name string) *Report[Row] {
	return &Report[Row]{Bench: name, Commit: commit(), Kernel: kernel(), CPUs: runtime.NumCPU()}
}

// commit is HEAD, with "-dirty" when files that it knows have changed; "unknown" outside a repository.
func commit() string {
	out, err := exec.Command("git", "-C", rig.Root(), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*").Output()
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(out))
}

func kernel() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// Path is where Save puts the report: build/bench/NAME.json.
func (r *Report[Row]) Path() string {
	return filepath.Join(rig.Root(), "build", "bench", r.Bench+".json")
}

// Save writes the report as JSON to Path.
func (r *Report[Row]) Save() error {
	if err := os.MkdirAll(filepath.Dir(r.Path()), 0o755); err != nil {
		return fmt.Errorf("make the folder of the report: %w", err)
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(r.Path(), append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	return nil
}

// Table writes the rows for a person: a column for each field.
func (r *Report[Row]) Table(w io.Writer) error {
	out := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	t := reflect.TypeFor[Row]()
	for i := range t.NumField() {
		name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
		fmt.Fprintf(out, "%s\t", name)
	}
	fmt.Fprintln(out)
	for _, row := range r.Rows {
		v := reflect.ValueOf(row)
		for i := range v.NumField() {
			fmt.Fprintf(out, "%s\t", cell(v.Field(i)))
		}
		fmt.Fprintln(out)
	}
	return out.Flush()
}

// cell is a value in few characters: three decimals below 10, one below 1000.
func cell(v reflect.Value) string {
	if !v.CanFloat() {
		return fmt.Sprint(v.Interface())
	}
	switch f := v.Float(); {
	case f < 10:
		return strconv.FormatFloat(f, 'f', 3, 64)
	case f < 1000:
		return strconv.FormatFloat(f, 'f', 1, 64)
	default:
		return strconv.FormatFloat(f, 'f', 0, 64)
	}
}
