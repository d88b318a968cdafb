package files

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Of the extended attributes of files and directories (xattr(7)) those of users are copied, and into a guest a file's capabilities
// as well; out of a guest they would be power over the host. Others belong to the system that they are on. Symbolic links have none.
const (
	userAttribute = "user."
	capabilities  = "security.capability"
	// maxAttributes bounds the names and values of one file in bytes: what Linux gives as the list at most, XATTR_LIST_MAX.
	// A file with more keeps those that fit.
	maxAttributes = 64 << 10
)

func copied(name string) bool {
	return strings.HasPrefix(name, userAttribute) || name == capabilities
}

// attribute is one extended attribute.
type attribute struct {
	name  string
	value []byte
}

func (a attribute) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(a.name)))
	return append(append(b, a.name...), a.value...)
}

// parseAttribute reads and checks an attribute of the peer's.
func parseAttribute(b []byte) (attribute, error) {
	name, value, ok := cutString(b)
	if !ok || !copied(name) || len(name) > maxName || len(b) > maxAttributes || strings.ContainsRune(name, 0) {
		return attribute{}, fmt.Errorf("%q is no extended attribute that is copied", name)
	}
	return attribute{name, append([]byte(nil), value...)}, nil
}

// attributes sends those of an open file or directory, whose entry is next. A file without any costs one system call.
func (s *sender) attributes(fd int, where string) error {
	var list [1024]byte
	names := list[:]
	n, err := unix.Flistxattr(fd, names)
	if errors.Is(err, unix.ERANGE) {
		names = make([]byte, maxAttributes)
		n, err = unix.Flistxattr(fd, names)
	}
	if errors.Is(err, unix.ENOTSUP) || n == 0 {
		return nil
	}
	if err != nil {
		return s.warning("%s: its extended attributes: %v", where, err)
	}
	room := maxAttributes
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
		if !copied(name) {
			continue
		}
		value := make([]byte, room)
		size, err := unix.Fgetxattr(fd, name, value)
		switch {
		case errors.Is(err, unix.ENODATA): // gone meanwhile
			continue
		case errors.Is(err, unix.ERANGE):
			err = fmt.Errorf("more than %d bytes", maxAttributes)
			fallthrough
		case err != nil:
			if err := s.warning("%s: its extended attribute %q: %v", where, name, err); err != nil {
				return err
			}
			continue
		}
		payload := attribute{name, value[:size]}.append(nil)
		if room -= len(payload); room < 0 {
			return s.warning("%s: has more than %d bytes of extended attributes", where, maxAttributes)
		}
		if err := s.frame(kindAttribute, payload); err != nil {
			return err
		}
	}
	return nil
}

// keep takes an attribute of the entry that is next.
func (in *receiver) keep(payload []byte) error {
	a, err := parseAttribute(payload)
	if err != nil {
		return errors.Join(errForm, err)
	}
	if in.kept += len(payload); in.kept > maxAttributes {
		return fmt.Errorf("%w: more than %d bytes of extended attributes", errForm, maxAttributes)
	}
	in.next = append(in.next, a)
	return nil
}

// taken are the attributes of the entry that comes now.
func (in *receiver) taken() []attribute {
	all := in.next
	in.next, in.kept = nil, 0
	return all
}

// setAttributes gives an open file or directory its attributes. A filesystem that has none is left alone; what else fails is a
// warning.
func (in *receiver) setAttributes(f *os.File, all []attribute) {
	for _, a := range all {
		if a.name == capabilities && !in.trusted {
			continue
		}
		err := unix.Fsetxattr(int(f.Fd()), a.name, a.value, 0)
		if err != nil && !errors.Is(err, unix.ENOTSUP) {
			in.warn(fmt.Sprintf("%s: its extended attribute %q: %v", f.Name(), a.name, err))
		}
	}
}
