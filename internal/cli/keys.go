package cli

import (
	"cmp"
	"fmt"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/spelling"
)

// A key names a value in what --output json prints, e.g. state, failure.step or labels.team. The views' own JSON tags
// are the keys: what is filtered by is what is printed.

// keysOf lists the keys of a view. That of a map ends with ".": any word may follow.
func keysOf(view any) []string {
	var out []string
	var walk func(t reflect.Type, prefix string)
	walk = func(t reflect.Type, prefix string) {
		for t.Kind() == reflect.Pointer {
			t = t.Elem()
		}
		for i := range t.NumField() {
			name, ok := jsonName(t.Field(i))
			if !ok {
				continue
			}
			switch inner := elemOf(t.Field(i).Type); {
			case inner.Kind() == reflect.Map:
				out = append(out, prefix+name+".")
			case inner.Kind() == reflect.Struct && inner != reflect.TypeFor[time.Time]():
				walk(inner, prefix+name+".")
			default:
				out = append(out, prefix+name)
			}
		}
	}
	walk(reflect.TypeOf(view), "")
	return out
}

// elemOf is what a pointer points to, or a list holds.
func elemOf(t reflect.Type) reflect.Type {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice || t.Kind() == reflect.Array {
		t = t.Elem()
	}
	return t
}

// jsonName is the key under which encoding/json prints a field; ok is false if it does not.
func jsonName(f reflect.StructField) (name string, ok bool) {
	name, _, _ = strings.Cut(f.Tag.Get("json"), ",")
	return name, f.IsExported() && name != "" && name != "-"
}

// known returns an error if no view has the key.
func known(keys []string, key string) error {
	best, distance := "", 4
	for _, k := range keys {
		// A key without what it lies in, or the beginning of one, is nearer than any other word.
		switch {
		case strings.HasSuffix(k, "."+key) && distance > 0:
			best, distance = k, 0
		case len(key) >= 3 && strings.HasPrefix(k, key) && distance > 1:
			best, distance = k, 1
		}
		ofMap := strings.HasSuffix(k, ".")
		if k == key && !ofMap || ofMap && len(key) > len(k) && strings.HasPrefix(key, k) {
			return nil
		}
		if d := spelling.Distance(key, k); d < distance {
			best, distance = k, d
		}
	}
	hint := "the keys are " + strings.Join(keys, ", ")
	if best != "" {
		hint = "did you mean " + best + "?"
		if strings.HasSuffix(best, ".") {
			hint = fmt.Sprintf("did you mean %sNAME?", best)
		}
	}
	return fault.New(fault.Invalid, "", "there is no key %q", key).WithHint("%s", hint)
}

// valuesAt are the values under a key: none if the view has it not, several where lists are on the way.
func valuesAt(view reflect.Value, key string) []reflect.Value {
	switch view.Kind() {
	case reflect.Pointer:
		if view.IsNil() {
			return nil
		}
		return valuesAt(view.Elem(), key)
	case reflect.Slice, reflect.Array:
		var out []reflect.Value
		for i := range view.Len() {
			out = append(out, valuesAt(view.Index(i), key)...)
		}
		return out
	}
	if key == "" {
		return []reflect.Value{view}
	}
	if view.Kind() == reflect.Map {
		v := view.MapIndex(reflect.ValueOf(key)) // dots belong to it
		if !v.IsValid() {
			return nil
		}
		return []reflect.Value{v}
	}
	name, rest, _ := strings.Cut(key, ".")
	for i := range view.NumField() {
		f := view.Type().Field(i)
		if n, ok := jsonName(f); ok && n == name {
			if strings.Contains(f.Tag.Get("json"), ",omitempty") && view.Field(i).IsZero() {
				return nil // as it is not printed
			}
			return valuesAt(view.Field(i), rest)
		}
	}
	return nil
}

// textOf is a value as JSON has it, a string without its quotes.
func textOf(v reflect.Value) string {
	switch v.Kind() {
	case reflect.Bool:
		return strconv.FormatBool(v.Bool())
	case reflect.Int, reflect.Int32, reflect.Int64:
		return strconv.FormatInt(v.Int(), 10)
	case reflect.Uint32:
		return strconv.FormatUint(v.Uint(), 10)
	case reflect.Float64:
		return strconv.FormatFloat(v.Float(), 'g', -1, 64)
	}
	if t, ok := v.Interface().(time.Time); ok {
		return t.Format(time.RFC3339Nano)
	}
	return v.String()
}

// filters is the repeatable flag --filter. All must hold.
type filters struct {
	keys []string
	all  []filter
}

type filter struct {
	key, pattern string
	not          bool
}

func (f *filters) String() string { return "" }
func (f *filters) Type() string   { return "KEY=PATTERN" }
func (f *filters) Set(s string) error {
	key, pattern, ok := strings.Cut(s, "=")
	if !ok {
		return fault.New(fault.Invalid, "", "%q is no filter", s).WithHint("KEY=PATTERN, such as state=running or name=web-*")
	}
	key, not := strings.CutSuffix(key, "!")
	if err := known(f.keys, key); err != nil {
		return err
	}
	if _, err := filepath.Match(pattern, ""); err != nil {
		return fault.New(fault.Invalid, "", "%q is no pattern", pattern).WithHint("* and ? stand for anything, [a-c] for one of these, \\ before one of them for itself")
	}
	f.all = append(f.all, filter{key, pattern, not})
	return nil
}

// split divides the filters into those of keys that begin otherwise and those of what follows prefix in the others.
func (f filters) split(prefix string) (others, inner filters) {
	for _, one := range f.all {
		if key, ok := strings.CutPrefix(one.key, prefix); ok {
			inner.all = append(inner.all, filter{key, one.pattern, one.not})
		} else {
			others.all = append(others.all, one)
		}
	}
	return others, inner
}

func (f *filters) match(view any) bool {
	for _, one := range f.all {
		values := valuesAt(reflect.ValueOf(view), one.key)
		found := len(values) == 0 && one.pattern == "" // nothing is there
		for _, v := range values {
			found = found || matches(one.pattern, textOf(v))
		}
		if found == one.not {
			return false
		}
	}
	return true
}

// matches is filepath.Match in which * stands for slashes, too: image names have them.
func matches(pattern, s string) bool {
	const other = "\x00"
	ok, _ := filepath.Match(strings.ReplaceAll(pattern, "/", other), strings.ReplaceAll(s, "/", other)) // the pattern was tried
	return ok
}

// sortKey is the flag --sort.
type sortKey struct {
	keys    []string
	key     string
	reverse bool
}

func (s *sortKey) String() string { return s.key }
func (s *sortKey) Type() string   { return "KEY" }
func (s *sortKey) Set(text string) error {
	s.key, s.reverse = strings.CutPrefix(text, "-")
	return known(s.keys, s.key)
}

// split is split of filters: one of the two orders nothing.
func (s sortKey) split(prefix string) (other, inner sortKey) {
	if key, ok := strings.CutPrefix(s.key, prefix); ok {
		return sortKey{}, sortKey{key: key, reverse: s.reverse}
	}
	return s, sortKey{}
}

// compare orders two views. What has no value comes last, in either direction.
func (s *sortKey) compare(x, y any) int {
	a, b := valuesAt(reflect.ValueOf(x), s.key), valuesAt(reflect.ValueOf(y), s.key)
	if len(a) == 0 || len(b) == 0 {
		return cmp.Compare(len(b), len(a))
	}
	order := slices.CompareFunc(a, b, compareValues)
	if s.reverse {
		return -order
	}
	return order
}

func compareValues(a, b reflect.Value) int {
	if t, ok := a.Interface().(time.Time); ok {
		return t.Compare(b.Interface().(time.Time))
	}
	switch a.Kind() {
	case reflect.Int, reflect.Int32, reflect.Int64:
		return cmp.Compare(a.Int(), b.Int())
	case reflect.Uint32:
		return cmp.Compare(a.Uint(), b.Uint())
	case reflect.Float64:
		return cmp.Compare(a.Float(), b.Float())
	}
	return cmp.Compare(textOf(a), textOf(b))
}
