package cli

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
)

// Every command says what it prints, and nothing is said of commands that are not there.
func TestEveryCommandSaysWhatItPrints(t *testing.T) {
	left := maps.Clone(printed)
	eachCommand((&app{}).root(), func(c *cobra.Command) {
		if _, ok := printed[c.CommandPath()]; !ok {
			t.Errorf("%s is not in printed: give it the view that it prints, or nil", c.CommandPath())
		}
		delete(left, c.CommandPath())
	})
	for path := range left {
		t.Errorf("there is no command %s", path)
	}
}

func TestArguments(t *testing.T) {
	for use, want := range map[string][]argumentSchema{
		"create [flags]":                      {},
		"ssh VM [-- COMMAND...]":              {{"VM", true, false, false}, {"COMMAND", false, true, true}},
		"exec [flags] VM -- COMMAND [ARG...]": {{"VM", true, false, false}, {"COMMAND", true, false, true}, {"ARG", false, true, true}},
		"run [flags] [-- COMMAND [ARG...]]":   {{"COMMAND", false, false, true}, {"ARG", false, true, true}},
		"set VM... FLAGS":                     {{"VM", true, true, false}},
		"ports [VM...]":                       {{"VM", false, true, false}},
		"port-forward VM [LOCAL:]PORT...":     {{"VM", true, false, false}, {"[LOCAL:]PORT", true, true, false}},
		"cp SOURCE... DESTINATION":            {{"SOURCE", true, true, false}, {"DESTINATION", true, false, false}},
	} {
		if diff := cmp.Diff(want, arguments(use)); diff != "" {
			t.Errorf("%s: %s", use, diff)
		}
	}
}

// The table of exit codes that people read is the one that programs read.
func TestExitCodesAreDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(string(page)) {
		cells := strings.Split(strings.TrimSpace(line), " | ")
		if len(cells) == 3 && strings.HasPrefix(line, "| ") && strings.Trim(cells[0], "| 0123456789") == "" {
			codes := strings.Split(strings.ReplaceAll(strings.Trim(cells[2], "| "), " (by an operator)", ""), ", ")
			slices.Sort(codes)
			got = append(got, fmt.Sprintf("%s %s: %s", strings.Trim(cells[0], "| "), cells[1], strings.Join(codes, " ")))
		}
	}
	var want []string
	for _, e := range exitCodeSchemas() {
		want = append(want, fmt.Sprintf("%d %s: %s", e.Code, e.Meaning, strings.Join(e.ErrorCodes, " ")))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
