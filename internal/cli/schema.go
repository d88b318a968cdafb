package cli

import (
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/version"
)

// printed is what each command prints with --output json, by its path: a value of the type. nil: what it prints is
// not banger's own, or for people alone. A command that is not here fails a test.
var printed = map[string]any{
	"banger vm create":          vmView{},
	"banger vm run":             nil,
	"banger vm list":            []vmView{},
	"banger vm show":            vmView{},
	"banger vm ssh":             nil,
	"banger vm exec":            nil,
	"banger vm cp":              copyView{},
	"banger vm port-forward":    []forwardingView{},
	"banger vm logs":            logView{},
	"banger vm wait":            vmView{},
	"banger vm start":           []resultView{},
	"banger vm stop":            []resultView{},
	"banger vm restart":         []resultView{},
	"banger vm set":             []resultView{},
	"banger vm stats":           []statsView{},
	"banger vm ports":           []portsView{},
	"banger vm trim":            []resultView{},
	"banger vm kill":            []resultView{},
	"banger vm delete":          []resultView{},
	"banger image list":         []*imageView{},
	"banger image show":         either{imageView{}, []imageResult{}},
	"banger image build":        imageView{},
	"banger image register":     imageView{},
	"banger image promote":      []imageResult{},
	"banger image export":       imageView{},
	"banger image import":       imageView{},
	"banger image pull":         imageView{},
	"banger image delete":       []imageResult{},
	"banger image prune":        pruneView{},
	"banger operation list":     []operationView{},
	"banger operation watch":    operationView{},
	"banger operation cancel":   operationView{},
	"banger daemon status":      daemonView{},
	"banger daemon socket":      socketView{},
	"banger daemon stop":        stoppedView{},
	"banger daemon restart":     daemonView{},
	"banger daemon logs":        nil, // the log's own lines
	"banger daemon install":     unitsView{},
	"banger daemon uninstall":   unitsView{},
	"banger tui":                nil,
	"banger doctor":             []findingView{},
	"banger ssh-config":         sshConfigView{},
	"banger ssh-config install": sshConfigView{},
	"banger ssh-config remove":  nil,
	"banger system install":     systemInstallView{},
	"banger system status":      systemView{},
	"banger system uninstall":   systemUninstallView{},
	"banger version":            versionView{},
	"banger bench create":       benchView{},
	"banger completion":         nil,
	"banger events":             eventView{}, // each line
	"banger schema":             schemaView{},
}

// either is printed by a command whose arguments decide what.
type either []any

// viewsOf are the types of what a command prints; none if that is nothing of banger's own.
func viewsOf(path string) (types []reflect.Type) {
	switch views := printed[path].(type) {
	case nil:
	case either:
		for _, v := range views {
			types = append(types, reflect.TypeOf(v))
		}
	default:
		types = append(types, reflect.TypeOf(views))
	}
	return types
}

// schemaView is what `banger schema` prints.
type schemaView struct {
	Version     string           `json:"version"`
	APIRevision int              `json:"api_revision"`
	ExitCodes   []exitCodeSchema `json:"exit_codes"`
	Error       map[string]any   `json:"error"` // JSON Schema of the line on stderr
	GlobalFlags []flagSchema     `json:"global_flags"`
	Commands    []commandSchema  `json:"commands"`
}

type exitCodeSchema struct {
	Code       int      `json:"code"`
	Meaning    string   `json:"meaning"`
	ErrorCodes []string `json:"error_codes"`
}

type commandSchema struct {
	Command   string           `json:"command"`
	Aliases   []string         `json:"aliases"`
	Summary   string           `json:"summary"`
	Usage     string           `json:"usage"`
	Arguments []argumentSchema `json:"arguments"`
	Flags     []flagSchema     `json:"flags"`
	Examples  []string         `json:"examples"`
	Outputs   []string         `json:"outputs"`          // values of --output
	Output    map[string]any   `json:"output,omitempty"` // JSON Schema of what --output json prints
}

type argumentSchema struct {
	Name      string `json:"name"`
	Required  bool   `json:"required"`
	Repeated  bool   `json:"repeated"`
	AfterDash bool   `json:"after_dash"` // it follows "--"
}

type flagSchema struct {
	Name      string   `json:"name"`
	Shorthand string   `json:"shorthand,omitempty"`
	Type      string   `json:"type"`
	Values    []string `json:"values,omitempty"`
	Default   string   `json:"default,omitempty"`
	Repeated  bool     `json:"repeated"`
	Usage     string   `json:"usage"`
}

func (a *app) schemaCommand() *cobra.Command {
	return &cobra.Command{
		Use: "schema", Short: "Print the command line as a contract for programs, in JSON",
		Long: `Print the command line as a contract for programs and agents: commands, arguments, flags, exit codes, and what each
command prints with --output json, as JSON Schema (2020-12). It is made of the program itself. No daemon is started.`,
		Example: `  banger schema
  banger schema | jq -r '.commands[].usage'
  banger schema | jq '.commands[] | select(.command == "banger vm create")'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !a.json { // there is no table of it
				a.output, a.json = outputJSON, true
			}
			return a.printJSON(makeSchema(cmd.Root()))
		},
	}
}

func makeSchema(root *cobra.Command) schemaView {
	s := schemaView{
		Version: version.String(), APIRevision: bangerv1.Revision, ExitCodes: exitCodeSchemas(),
		Error: jsonSchema(reflect.TypeFor[struct {
			Error errorView `json:"error"`
		}]()),
		GlobalFlags: flagSchemas(root.PersistentFlags()),
	}
	eachCommand(root, func(c *cobra.Command) { s.Commands = append(s.Commands, describe(c)) })
	return s
}

// eachCommand visits the commands that do something and are not hidden, in the order in which help lists them.
func eachCommand(c *cobra.Command, visit func(*cobra.Command)) {
	if c.Hidden || c.Name() == "help" {
		return
	}
	if c.Annotations[groupAnnotation] == "" {
		visit(c)
	}
	for _, sub := range c.Commands() {
		eachCommand(sub, visit)
	}
}

func describe(c *cobra.Command) commandSchema {
	s := commandSchema{
		Command: c.CommandPath(), Aliases: append([]string{}, c.Aliases...), Summary: c.Short, Usage: c.UseLine(),
		Arguments: arguments(c.Use), Flags: flagSchemas(c.LocalNonPersistentFlags()), Examples: []string{}, Outputs: outputsOf(c),
	}
	for line := range strings.Lines(c.Example) {
		s.Examples = append(s.Examples, strings.TrimSpace(line))
	}
	switch views := viewsOf(c.CommandPath()); len(views) {
	case 0:
	case 1:
		s.Output = jsonSchema(views[0])
	default:
		var one []map[string]any
		for _, view := range views {
			one = append(one, jsonSchema(view))
		}
		s.Output = map[string]any{"oneOf": one}
	}
	return s
}

// outputsOf are the values of --output that a command has.
func outputsOf(c *cobra.Command) []string {
	out := []string{outputTable}
	if c.Annotations[wideAnnotation] != "" {
		out = append(out, outputWide)
	}
	if views := viewsOf(c.CommandPath()); len(views) > 0 {
		out = append(out, outputJSON, outputYAML)
		if !slices.ContainsFunc(views, func(t reflect.Type) bool { return !hasNames(t) }) {
			out = append(out, outputName)
		}
	}
	return out
}

// arguments reads a usage line, e.g. "ssh VM [-- COMMAND...]".
func arguments(use string) []argumentSchema {
	out := []argumentSchema{}
	depth, dash := 0, false
	for _, word := range strings.Fields(use)[1:] {
		if word == "[flags]" || word == "FLAGS" {
			continue
		}
		opens, closes := strings.Count(word, "["), strings.Count(word, "]")
		// "[LOCAL:]PORT" has an optional part; "[VM...]" is one.
		optional := depth > 0 || strings.HasPrefix(word, "[") && (opens > closes || strings.HasSuffix(word, "]"))
		depth += opens - closes
		if strings.Trim(word, "[]") == "--" {
			dash = true
			continue
		}
		if optional {
			word = strings.Trim(word, "[]")
		}
		name, repeated := strings.CutSuffix(word, "...")
		out = append(out, argumentSchema{Name: name, Required: !optional, Repeated: repeated, AfterDash: dash})
	}
	return out
}

func flagSchemas(set *pflag.FlagSet) []flagSchema {
	out := []flagSchema{}
	set.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		s := flagSchema{Name: f.Name, Shorthand: f.Shorthand, Type: f.Value.Type(), Default: f.DefValue, Usage: f.Usage,
			Repeated: strings.Contains(f.Usage, "can be repeated")}
		if c, ok := f.Value.(*choice); ok {
			s.Type, s.Values = "choice", c.allowed
		}
		out = append(out, s)
	})
	return out
}

func exitCodeSchemas() []exitCodeSchema {
	codes := map[int][]string{}
	for code, exit := range exitCodes {
		codes[exit] = append(codes[exit], string(code))
	}
	var out []exitCodeSchema
	for exit, meaning := range exitMeanings {
		slices.Sort(codes[exit])
		out = append(out, exitCodeSchema{exit, meaning, append([]string{}, codes[exit]...)})
	}
	slices.SortFunc(out, func(x, y exitCodeSchema) int { return x.Code - y.Code })
	return out
}

// jsonSchema describes what encoding/json makes of a view, as JSON Schema (2020-12).
func jsonSchema(t reflect.Type) map[string]any {
	switch t.Kind() {
	case reflect.Pointer:
		return jsonSchema(t.Elem())
	case reflect.Slice, reflect.Array:
		return map[string]any{"type": "array", "items": jsonSchema(t.Elem())}
	case reflect.Map:
		if t.Elem().Kind() == reflect.Interface {
			return map[string]any{"type": "object"}
		}
		return map[string]any{"type": "object", "additionalProperties": jsonSchema(t.Elem())}
	case reflect.String:
		return map[string]any{"type": "string"}
	case reflect.Bool:
		return map[string]any{"type": "boolean"}
	case reflect.Int, reflect.Int32, reflect.Int64, reflect.Uint32:
		return map[string]any{"type": "integer"}
	case reflect.Float64:
		return map[string]any{"type": "number"}
	}
	if t == reflect.TypeFor[time.Time]() {
		return map[string]any{"type": "string", "format": "date-time"}
	}
	properties, required := map[string]any{}, []string{}
	for i := range t.NumField() {
		f := t.Field(i)
		name, ok := jsonName(f)
		if !ok {
			continue
		}
		p := jsonSchema(f.Type)
		if !strings.Contains(f.Tag.Get("json"), ",omitempty") {
			required = append(required, name)
			if f.Type.Kind() == reflect.Pointer {
				p["type"] = []any{p["type"], "null"}
			}
		}
		if t == reflect.TypeFor[errorView]() && name == "code" {
			p["enum"] = faultCodes()
		}
		properties[name] = p
	}
	return map[string]any{"type": "object", "properties": properties, "required": required}
}

// faultCodes are the stable codes of errors.
func faultCodes() []string {
	var out []string
	for code := range exitCodes {
		out = append(out, string(code))
	}
	slices.Sort(out)
	return out
}
