package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
)

// The values of --output.
const (
	outputTable = "table"
	outputWide  = "wide" // a table with all columns
	outputJSON  = "json"
	outputYAML  = "yaml" // what outputJSON prints, in another notation
	outputName  = "name" // one name a line
)

func newOutput() *choice {
	return newChoice(outputTable, outputTable, outputWide, outputJSON, outputYAML, outputName)
}

// wideAnnotation marks commands whose table has more columns than are shown by default.
const wideAnnotation = "wide"

// setOutput takes the value of --output, and refuses what the command has not got.
func (a *app) setOutput(cmd *cobra.Command, output string) error {
	a.output, a.json = output, output != outputTable && output != outputWide
	switch {
	case output == outputWide && cmd.Annotations[wideAnnotation] == "":
		return usage(cmd, "%s has no wider table than its own", cmd.CommandPath())
	case output == outputName && !slices.Contains(outputsOf(cmd), outputName):
		return usage(cmd, "%s prints no names", cmd.CommandPath())
	}
	return nil
}

// printJSON prints a view on stdout as --output says: JSON, indented, YAML, or its names.
func (a *app) printJSON(v any) error { return a.printValue(v, true) }

// printValue is printJSON; unless indented, a value of JSON is one line, and one of YAML a document of its own.
func (a *app) printValue(v any, indented bool) error {
	var text []byte
	var err error
	switch a.output {
	case outputName:
		text = []byte(names(v))
	case outputYAML:
		text, err = asYAML(v)
		if !indented {
			text = append([]byte("---\n"), text...)
		}
	default:
		text, err = asJSON(v, indented)
	}
	if err != nil {
		return err
	}
	_, err = a.stdout.Write(text)
	return err
}

func asJSON(v any, indented bool) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if indented {
		enc.SetIndent("", "  ")
	}
	err := enc.Encode(v)
	return b.Bytes(), err
}

// oldYAML matches strings that a reader of YAML 1.1 takes for something else unless they are quoted: its booleans, its
// numbers to the base 60, and what it breaks lines at.
var oldYAML = regexp.MustCompile(`(?i)^(y|n|yes|no|on|off)$|^[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+|[\x{85}\x{2028}\x{2029}]`)

// asYAML reads the JSON of v, which is YAML as well (YAML 1.2, section 1.3), and writes it in block style: so the two
// cannot differ in keys, their order, or what is left out.
func asYAML(v any) ([]byte, error) {
	text, err := asJSON(v, false)
	if err != nil {
		return nil, err
	}
	var root yaml.Node
	if err := yaml.Unmarshal(text, &root); err != nil {
		return nil, err
	}
	var restyle func(*yaml.Node)
	restyle = func(n *yaml.Node) {
		if n.Kind != yaml.ScalarNode || !oldYAML.MatchString(n.Value) {
			n.Style = 0 // the encoder quotes strings that YAML 1.2 would read as something else
		}
		for _, c := range n.Content {
			restyle(c)
		}
	}
	restyle(&root)
	var b bytes.Buffer
	enc := yaml.NewEncoder(&b)
	enc.SetIndent(2)
	if err := enc.Encode(&root); err != nil {
		return nil, err
	}
	return b.Bytes(), enc.Close()
}

// names are those of a view, or of each of a list that nothing failed for, a line each.
func names(v any) string {
	var b strings.Builder
	value := reflect.ValueOf(v)
	if value.Kind() != reflect.Slice {
		list := reflect.MakeSlice(reflect.SliceOf(value.Type()), 0, 1)
		value = reflect.Append(list, value)
	}
	for i := range value.Len() {
		item := reflect.Indirect(value.Index(i))
		if !item.IsValid() {
			continue
		}
		if ok := item.FieldByName("OK"); ok.IsValid() && !ok.Bool() {
			continue
		}
		if name := item.FieldByName(nameField(item.Type())).String(); name != "" {
			fmt.Fprintln(&b, name)
		}
	}
	return b.String()
}

// nameField is the field of a view by which commands refer to what it shows; "" if it has none.
func nameField(t reflect.Type) string {
	for _, name := range []string{"Name", "ID"} {
		if f, ok := t.FieldByName(name); ok && f.Type.Kind() == reflect.String {
			return name
		}
	}
	return ""
}

func hasNames(t reflect.Type) bool {
	for t != nil && (t.Kind() == reflect.Slice || t.Kind() == reflect.Pointer) {
		t = t.Elem()
	}
	return t != nil && t.Kind() == reflect.Struct && nameField(t) != ""
}
