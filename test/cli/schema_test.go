package cli

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// schema is the part of `banger schema` that this test reads.
type schema struct {
	Error    map[string]any `json:"error"`
	Commands []struct {
		Command string         `json:"command"`
		Outputs []string       `json:"outputs"`
		Output  map[string]any `json:"output"`
		Flags   []struct {
			Name string `json:"name"`
		} `json:"flags"`
	} `json:"commands"`
}

// conforms returns what about a value is not as a JSON Schema says, of the words that banger's have. Keys that the
// schema does not name are wrong, too: it is to be complete.
func conforms(at string, s map[string]any, v any) []string {
	if one, ok := s["oneOf"].([]any); ok {
		var all []string
		for _, o := range one {
			wrong := conforms(at, o.(map[string]any), v)
			if len(wrong) == 0 {
				return nil
			}
			all = append(all, wrong...)
		}
		return all
	}
	var kind string
	switch v := v.(type) {
	case nil:
		kind = "null"
	case bool:
		kind = "boolean"
	case string:
		kind = "string"
	case []any:
		kind = "array"
	case map[string]any:
		kind = "object"
	case float64:
		kind = "number"
		if v == float64(int64(v)) {
			kind = "integer"
		}
	}
	types, many := s["type"].([]any)
	if !many {
		types = []any{s["type"]}
	}
	if kind == "integer" && slices.Contains(types, any("number")) {
		kind = "number"
	}
	if !slices.Contains(types, any(kind)) {
		return []string{fmt.Sprintf("%s is %s, not %v", at, kind, s["type"])}
	}
	var wrong []string
	if enum, ok := s["enum"].([]any); ok && !slices.Contains(enum, v) {
		wrong = append(wrong, fmt.Sprintf("%s is %v, none of %v", at, v, enum))
	}
	switch v := v.(type) {
	case []any:
		for i, item := range v {
			wrong = append(wrong, conforms(fmt.Sprintf("%s[%d]", at, i), s["items"].(map[string]any), item)...)
		}
	case map[string]any:
		properties, _ := s["properties"].(map[string]any)
		for key, value := range v {
			if p, ok := properties[key].(map[string]any); ok {
				wrong = append(wrong, conforms(at+"."+key, p, value)...)
			} else if p, ok := s["additionalProperties"].(map[string]any); ok {
				wrong = append(wrong, conforms(at+"."+key, p, value)...)
			} else if properties != nil {
				wrong = append(wrong, fmt.Sprintf("%s.%s is not in the schema", at, key))
			}
		}
		required, _ := s["required"].([]any)
		for _, key := range required {
			if _, ok := v[key.(string)]; !ok {
				wrong = append(wrong, fmt.Sprintf("%s.%s is missing", at, key))
			}
		}
	}
	return wrong
}

// TestSchema runs commands and holds what they print to what `banger schema` says that they do.
func TestSchema(t *testing.T) {
	work := t.TempDir()
	env, err := install.Env(work)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := install.EndDaemons(work); err != nil {
			t.Error(err)
		}
	})
	run := func(line string) (stdout, stderr []byte) {
		cmd := exec.Command(filepath.Join(install.Bin, "banger"), strings.Fields(line)...)
		cmd.Env = append(os.Environ(), env...)
		var e strings.Builder
		cmd.Stderr = &e
		out, _ := cmd.Output() // some are to fail
		return out, []byte(e.String())
	}
	var s schema
	out, _ := run("schema")
	if err := json.Unmarshal(out, &s); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if pids := install.Daemons(work); len(pids) > 0 {
		t.Errorf("schema started a daemon")
	}
	seen := map[string]bool{}
	for _, line := range []string{
		"vm create --name otter --label a=b", "vm list", "vm show otter", "vm wait otter", "vm stats", "vm ports", "vm logs otter",
		"vm stop otter nobody", "vm start otter", "vm restart otter", "vm set otter --label c=d", "vm trim otter", "vm kill otter", "vm stats otter nobody",
		"image list", "image show default", "image show default nobody", "image promote nobody", "image delete nobody", "image prune --dry-run", "operation list", "daemon status", "daemon socket", "daemon restart", "system status", "doctor", "version", "ssh-config", "ssh-config install", "schema", "bench create --runs 1",
		"vm delete otter", "vm list", "daemon stop",
	} {
		out, _ := run(line + " -o json")
		for _, c := range s.Commands {
			if !strings.HasPrefix("banger "+line+" ", c.Command+" ") {
				continue
			}
			if c.Command == "banger ssh-config" && line != "ssh-config" {
				continue
			}
			seen[c.Command] = true
			var v any
			if err := json.Unmarshal(out, &v); err != nil {
				t.Errorf("%s: %v\n%s", line, err, out)
				continue
			}
			for _, wrong := range conforms("", c.Output, v) {
				t.Errorf("%s: %s", line, wrong)
			}
		}
	}
	for _, c := range s.Commands {
		if c.Output == nil || seen[c.Command] {
			continue
		}
		switch c.Command {
		case "banger system install", "banger system uninstall", "banger daemon install", "banger daemon uninstall", "banger events", "banger image register", "banger image build", "banger image pull", "banger image export", "banger image import", "banger vm cp", "banger vm port-forward", "banger operation watch", "banger operation cancel": // take more than a line
		default:
			t.Errorf("%s is not tried here", c.Command)
		}
	}
	_, stderr := run("vm show nobody -o json")
	var v any
	if err := json.Unmarshal(stderr, &v); err != nil {
		t.Fatalf("%v\n%s", err, stderr)
	}
	for _, wrong := range conforms("", s.Error, v) {
		t.Errorf("error: %s", wrong)
	}
	if wrong := conforms("", s.Error, map[string]any{"error": map[string]any{"code": "odd", "message": 1.0, "more": nil}}); len(wrong) != 3 {
		t.Errorf("the check notices %v", wrong)
	}
}
