package main

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// floorReport has every figure of bench-floor; change alters one.
func floorReport(change map[string]float64) *report {
	r := newReport(quickPlan, ".")
	r.Host = &machine{}
	for _, s := range floorStages {
		r.Figures[s.name] = figure{P50: 1000, P95: 1100, Samples: 3, Unit: "ms"}
	}
	for name, v := range map[string]float64{"stock.ssh": 4000, "banger.create": 1050, "bare.ssh": 2000} {
		r.Figures[name] = figure{P50: v, P95: v, Samples: 3, Unit: "ms"}
	}
	for name, v := range change {
		r.Figures[name] = figure{P50: v, P95: v, Samples: 3, Unit: "ms"}
	}
	return r
}

func TestFloorIsJudged(t *testing.T) {
	if wrong := floorReport(nil).judgeFloor(); len(wrong) != 0 {
		t.Errorf("good figures fail: %v", wrong)
	}
	for what, test := range map[string]struct {
		change map[string]float64
		want   string
	}{
		"slow create":   {map[string]float64{"banger.create": 1101.0 + 5}, "create: 1.11"},
		"much memory":   {map[string]float64{"banger.pss": 1060}, "memory at rest: 1.06"},
		"agent late":    {map[string]float64{"bare.agent": 1500, "banger.create": 1500}, "agent answers: 0.38"},
		"sshd late":     {map[string]float64{"bare.ssh": 2500}, "sshd answers: 0.63"},
		"untrimmed one": {map[string]float64{"stock.ssh": 2000}, "agent answers: 0.50"},
	} {
		if wrong := strings.Join(floorReport(test.change).judgeFloor(), "\n"); !strings.Contains(wrong, test.want) {
			t.Errorf("%s: %q, want %q in it", what, wrong, test.want)
		}
	}
	for _, s := range floorStages {
		r := floorReport(nil)
		delete(r.Figures, s.name)
		if wrong := strings.Join(r.judgeFloor(), "\n"); !strings.Contains(wrong, "no figure: "+s.name) {
			t.Errorf("%s is missing, and that is said: %q", s.name, wrong)
		}
	}
}

func TestRefreshKeepsTheOtherTable(t *testing.T) {
	page := filepath.Join(t.TempDir(), "page.md")
	text := "a\n<!-- made by make bench: begin -->\nold\n<!-- made by make bench: end -->\nb\n" +
		"<!-- made by make bench-floor: begin -->\n<!-- made by make bench-floor: end -->\n"
	if err := os.WriteFile(page, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := refresh(page, "make bench-floor", "new"); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(page)
	want := strings.Replace(text, "floor: begin -->\n", "floor: begin -->\n\nnew\n", 1)
	if err != nil || string(got) != want {
		t.Errorf("%v\n%s", err, got)
	}
	if err := refresh(page, "make nothing", "new"); err == nil {
		t.Error("a page without a place for the table is accepted")
	}
}

// benchReport has every figure of bench, all as good as need be.
func benchReport() *report {
	r := newReport(quickPlan, ".")
	for _, name := range []string{"create.programs", "create.programs_cli", "real.programs"} {
		r.count(name, 0)
	}
	r.judge()
	for _, name := range r.missing {
		r.Figures[name] = figure{P50: 1, P95: 1, Samples: 3, Unit: "ms"}
	}
	r.missing, r.Thresholds, r.Goals = nil, nil, nil
	return r
}

// TestBenchIsJudged: a figure that is over its threshold fails, and one that is printed as missing, whatever it is for.
func TestBenchIsJudged(t *testing.T) {
	good := benchReport()
	if wrong := good.judge(); len(wrong) != 0 || strings.Contains(good.table(), "missing") {
		t.Errorf("good figures fail: %v\n%s", wrong, good.table())
	}
	slow := benchReport()
	slow.Figures["real.warm.host"] = figure{P50: 1000, Unit: "ms"}
	if wrong := strings.Join(slow.judge(), "\n"); !strings.Contains(wrong, "real create: 100.00 times") {
		t.Errorf("a slow create: %q", wrong)
	}
	stages := 0
	for _, f := range good.rows() {
		r := benchReport()
		delete(r.Figures, f.name)
		if wrong := strings.Join(r.judge(), "\n"); !strings.Contains(wrong, "no figure: "+f.name) || !strings.Contains(r.table(), "| "+f.label+" | missing |") {
			t.Errorf("%s is missing, and that is said: %q", f.name, wrong)
		}
		if strings.HasPrefix(f.name, "real.") {
			stages++
		}
	}
	if stages != 2*len(realStages)+1 {
		t.Errorf("the table has %d lines of real creates", stages)
	}
}

// TestBootIsJudged: a figure that is missing fails and is printed as such; what banger makes may not be slower than with what it left out.
func TestBootIsJudged(t *testing.T) {
	report := func() *report {
		r := newReport(quickPlan, ".")
		r.Host = &machine{}
		for _, v := range variants("", "", "", "") {
			for _, c := range bootColumns {
				r.Figures[v.name+"."+c.name] = figure{P50: 1000, Unit: "ms"}
			}
		}
		return r
	}
	good := report()
	good.Figures["quiet.ssh"] = figure{P50: 1230, Unit: "ms"}
	if wrong := good.judgeBoot(); len(wrong) != 0 || strings.Contains(good.tableOfBoot(), "missing") {
		t.Errorf("good figures fail: %v\n%s", wrong, good.tableOfBoot())
	}
	if want := "| without `quiet` | 1000 ms | +0 % | 1230 ms | +23 % |\n"; !strings.Contains(good.tableOfBoot(), want) {
		t.Errorf("no line %q in\n%s", want, good.tableOfBoot())
	}
	slow := report()
	slow.Figures[asMade+".agent"] = figure{P50: 1100, Unit: "ms"}
	if wrong := strings.Join(slow.judgeBoot(), "\n"); !strings.Contains(wrong, "the agent has answered: 1.10") {
		t.Errorf("slower than with everything: %q", wrong)
	}
	for _, v := range variants("", "", "", "") {
		r := report()
		delete(r.Figures, v.name+".ssh")
		if wrong := strings.Join(r.judgeBoot(), "\n"); !strings.Contains(wrong, "no figure: "+v.name+".ssh") || !strings.Contains(r.tableOfBoot(), "missing") {
			t.Errorf("%s is missing, and that is said: %q", v.name, wrong)
		}
	}
}

// TestSource: what a variant leaves out has to be there, whatever its value, and the rest stays as it was.
func TestSource(t *testing.T) {
	model := json.RawMessage(`{"kernel_image_path":"k","initrd_path":"i","boot_args":"quiet lsm=a,b quieter TERM=dumb"}`)
	got, err := variant{without: []string{"quiet", "lsm"}, initrd: "j"}.source(model)
	if want := (map[string]string{"kernel_image_path": "k", "initrd_path": "j", "boot_args": "quieter TERM=dumb"}); err != nil || !maps.Equal(got, want) {
		t.Errorf("%v, %v, want %v", got, err, want)
	}
	if _, err := (variant{without: []string{"quiet", "loud"}}).source(model); err == nil || !strings.Contains(err.Error(), "loud") {
		t.Errorf("a word that is not there: %v", err)
	}
}
