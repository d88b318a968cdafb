package cli

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func testViews() []*vmView {
	at := func(s int64) *time.Time { t := time.Unix(s, 0).UTC(); return &t }
	return []*vmView{
		{Name: "web-2", State: "running", MemoryMiB: 1024, Image: "lib/debian:12", Labels: map[string]string{"team": "web", "a.b": "c"}, StartedAt: at(30), Boot: []bootView{{"init", 1}, {"ssh", 9.5}}},
		{Name: "db", State: "stopped", MemoryMiB: 900, Labels: map[string]string{}, StoppedAt: at(10)},
		{Name: "web-1", State: "failed", MemoryMiB: 512, Failure: &failureView{Step: "vmm", Error: &errorView{Code: "timeout"}}, StartedAt: at(20)},
	}
}

func namesOf(views []*vmView) string {
	var out []string
	for _, v := range views {
		out = append(out, v.Name)
	}
	return strings.Join(out, " ")
}

func TestFilterAndSort(t *testing.T) {
	keys := keysOf(vmView{})
	for _, tt := range []struct{ filter, sort, want string }{
		{"", "", "web-2 db web-1"},
		{"state=running", "", "web-2"},
		{"state!=running", "", "db web-1"},
		{"name=web-*", "name", "web-1 web-2"},
		{"name=web-[2-9]", "", "web-2"},
		{"image=lib*", "", "web-2"},
		{"image=*:12", "", "web-2"},
		{"labels.team=web", "", "web-2"},
		{"labels.a.b=c", "", "web-2"},
		{"labels.team!=web", "", "db web-1"},
		{"failure.error.code=timeout", "", "web-1"},
		{"failure.step=", "", "web-2 db"},
		{"memory_mib=512", "", "web-1"},
		{"boot.name=ssh", "", "web-2"},
		{"boot.at_ms=9.5", "", "web-2"},
		{"autostart=false", "", "web-2 db web-1"},
		{"started_at=1970-01-01T00:00:*Z", "", "web-2 web-1"},
		{"state=running state=stopped", "", ""},
		{"", "memory_mib", "web-1 db web-2"},
		{"", "-memory_mib", "web-2 db web-1"},
		{"", "started_at", "web-1 web-2 db"},
		{"", "-started_at", "web-2 web-1 db"},
		{"", "state", "web-1 web-2 db"},
	} {
		o := &listOptions{filters: filters{keys: keys}, sort: sortKey{keys: keys}}
		for _, f := range strings.Fields(tt.filter) {
			if err := o.filters.Set(f); err != nil {
				t.Fatal(err)
			}
		}
		if tt.sort != "" {
			if err := o.sort.Set(tt.sort); err != nil {
				t.Fatal(err)
			}
		}
		if got := namesOf(apply(testViews(), o.filters, o.sort)); got != tt.want {
			t.Errorf("filter %q sort %q: %q, want %q", tt.filter, tt.sort, got, tt.want)
		}
	}
	for _, bad := range []string{"state", "nonsense=x", "=x", "labels=x", "labels.=x", "failure=x", "name=[a"} {
		if err := (&filters{keys: keys}).Set(bad); err == nil {
			t.Errorf("%q is taken as a filter", bad)
		}
	}
	for _, bad := range []string{"", "-", "nonsense", "boot"} {
		if err := (&sortKey{keys: keys}).Set(bad); err == nil {
			t.Errorf("%q is taken as a key", bad)
		}
	}
}

func TestKnownSuggests(t *testing.T) {
	keys := keysOf(vmView{})
	for key, want := range map[string]string{"nonsense": "the keys are id, name", "memory": "did you mean memory_mib?", "step": "did you mean failure.step?", "memory_mb": "did you mean memory_mib?", "label": "did you mean labels.NAME?"} {
		err := known(keys, key)
		if v := viewError(err); v == nil || !strings.HasPrefix(v.Hint, want) {
			t.Errorf("%s: %+v, want %q", key, v, want)
		}
	}
}

// YAML is the same value: same keys in the same order, and no string that reads as something else.
func TestYAML(t *testing.T) {
	v := struct {
		Name  string            `json:"name"`
		Tries []string          `json:"tries"`
		None  []string          `json:"none"`
		Map   map[string]string `json:"map"`
		N     int64             `json:"n"`
		F     float64           `json:"f"`
		Null  *int              `json:"null"`
	}{"a: b", []string{"yes", "12", "null", "", "- x", "two\nlines", "é <&>", "0x1f", "2026-01-01", "~", "\u2028", "1:20"}, []string{}, map[string]string{"on": "off"}, 1 << 40, 1.5, nil}
	got, err := asYAML(v)
	if err != nil {
		t.Fatal(err)
	}
	want := `name: 'a: b'
tries:
  - "yes"
  - "12"
  - "null"
  - ""
  - '- x'
  - |-
    two
    lines
  - é <&>
  - "0x1f"
  - "2026-01-01"
  - "~"
  - "\L"
  - "1:20"
none: []
map:
  "on": "off"
"n": 1099511627776
f: 1.5
"null": null
`
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Error(diff)
	}
}

func TestNames(t *testing.T) {
	for _, tt := range []struct {
		view any
		want string
	}{
		{testViews(), "web-2\ndb\nweb-1\n"},
		{testViews()[0], "web-2\n"},
		{[]resultView{{Ref: "x", Error: &errorView{}}, {Ref: "y", OK: true, Name: "y"}}, "y\n"},
		{[]operationView{{ID: "1", Error: &errorView{}}}, "1\n"},
		{(*vmView)(nil), ""},
		{[]*vmView{}, ""},
	} {
		if got := names(tt.view); got != tt.want {
			t.Errorf("%T: %q, want %q", tt.view, got, tt.want)
		}
	}
}

// Columns that are wide or have nothing to say are left out.
func TestListColumns(t *testing.T) {
	l := list[*vmView]{columns: []column[*vmView]{
		{title: "NAME", of: func(v *vmView) cell { return cell{text: v.Name} }},
		{title: "MEMORY", wide: true, of: func(v *vmView) cell { return cell{text: formatBytes(v.MemoryMiB << 20)} }},
		{title: "NOTE", rare: true, of: func(v *vmView) cell { return cell{text: v.Note} }},
	}}
	views := testViews()[:2]
	for _, tt := range []struct{ output, note, want string }{
		{outputTable, "", "NAME\nweb-2\ndb\n"},
		{outputWide, "", "NAME   MEMORY\nweb-2  1 GiB\ndb     900 MiB\n"},
		{outputTable, "paused", "NAME   NOTE\nweb-2\ndb     paused\n"},
	} {
		views[1].Note = tt.note
		a := &app{output: tt.output}
		var b bytes.Buffer
		if err := table(&b, false, l.header(a, views), l.rows(a, views)); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(tt.want, b.String()); diff != "" {
			t.Error(diff)
		}
	}
}
