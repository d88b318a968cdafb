package tui

import (
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"git.thaloco.com/thaloco/banger/client"
)

// clean makes all text in a message of the daemon's safe to show. It is done once, where messages come in, so that
// no place that shows something can forget it.
func clean(m proto.Message) {
	if m != nil && m.ProtoReflect().IsValid() {
		cleanMessage(m.ProtoReflect())
	}
}

func cleanMessage(m protoreflect.Message) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsMap():
			cleanMap(f, v.Map())
		case f.IsList() && f.Kind() == protoreflect.StringKind:
			for i := range v.List().Len() {
				v.List().Set(i, cleanString(v.List().Get(i)))
			}
		case f.IsList() && f.Kind() == protoreflect.MessageKind:
			for i := range v.List().Len() {
				cleanMessage(v.List().Get(i).Message())
			}
		case f.IsList():
		case f.Kind() == protoreflect.StringKind:
			m.Set(f, cleanString(v))
		case f.Kind() == protoreflect.MessageKind:
			cleanMessage(v.Message())
		}
		return true
	})
}

// cleanMap cleans keys and values: the API has maps of strings alone.
func cleanMap(f protoreflect.FieldDescriptor, m protoreflect.Map) {
	if f.MapKey().Kind() != protoreflect.StringKind || f.MapValue().Kind() != protoreflect.StringKind {
		return
	}
	all := map[string]protoreflect.Value{}
	m.Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
		all[client.Visible(k.String())] = cleanString(v)
		m.Clear(k)
		return true
	})
	for k, v := range all {
		m.Set(protoreflect.ValueOfString(k).MapKey(), v)
	}
}

func cleanString(v protoreflect.Value) protoreflect.Value {
	return protoreflect.ValueOfString(client.Visible(v.String()))
}
