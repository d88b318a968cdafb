package sandbox

import "bytes"

// longestLine is what is kept of a line that does not end, in bytes: longer ones are broken.
const longestLine = 64 << 10

// lines cuts what comes in pieces into lines. Not safe for concurrent use.
type lines struct {
	ends    string // the characters that end one
	partial []byte
}

// take calls each with every line that ends in b, its end included. A line is good until each returns.
func (l *lines) take(b []byte, each func(line []byte)) {
	for len(b) > 0 {
		at := bytes.IndexAny(b, l.ends)
		if at < 0 && len(l.partial)+len(b) < longestLine {
			l.partial = append(l.partial, b...)
			return
		}
		if at < 0 {
			at = len(b) - 1
		}
		each(append(l.partial, b[:at+1]...))
		l.partial, b = l.partial[:0], b[at+1:]
	}
}

// rest calls each with a last line that did not end, if there is one.
func (l *lines) rest(each func(line []byte)) {
	if len(l.partial) > 0 {
		each(l.partial)
		l.partial = nil
	}
}
