package wire

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

// Headers of a stream, one line each:
//
//	http                  HTTP/1.1 follows: the API of api/banger/agent/v1
//	tcp <port> wait       a TCP connection to the guest's loopback; "wait": once something listens
//	tcp <port> nowait     there. Answered by "ok" or "err <text>", then the bytes follow
//	tcp <port> nowait <address>
//	                      the same to another address of the guest's
//	forward <port>        the same without waiting; frame.Duplex's frames follow the answer
//	exec                  a command: answered likewise, then the frames of package exec
//	cp                    files: answered likewise, then the frames of package files
//	ports                 what the guest listens on: answered likewise, then the lists of ReadPorts
//	cut <stream>          gives up the yamux stream of that number. A stream's Close says only "no
//	                      more from me", and yamux offers no reset
const (
	maxHeader = 64
	maxAnswer = 1024
)

// Kind of a stream.
type Kind string

// The kinds.
const (
	KindHTTP    Kind = "http"
	KindTCP     Kind = "tcp"
	KindForward Kind = "forward"
	KindExec    Kind = "exec"
	KindCopy    Kind = "cp"
	KindPorts   Kind = "ports"
	KindCut     Kind = "cut"
)

// Header is what a stream is for.
type Header struct {
	Kind Kind
	Port int  // KindTCP, KindForward
	Wait bool // KindTCP
	// Address is that of KindTCP without Wait; invalid: the guest's loopback, of either family.
	Address netip.Addr
	Stream  uint32 // KindCut
}

// String renders the header with its line end.
func (h Header) String() string {
	switch h.Kind {
	case KindTCP:
		wait := "nowait"
		if h.Wait {
			wait = "wait"
		} else if h.Address.IsValid() {
			wait += " " + h.Address.String()
		}
		return fmt.Sprintf("tcp %d %s\n", h.Port, wait)
	case KindForward:
		return fmt.Sprintf("forward %d\n", h.Port)
	case KindCut:
		return fmt.Sprintf("cut %d\n", h.Stream)
	}
	return string(h.Kind) + "\n"
}

// ParseHeader reads a header line without its line end.
func ParseHeader(line string) (Header, error) {
	bad := fmt.Errorf("%q is not the header of a stream", line)
	fields := strings.Split(line, " ")
	switch Kind(fields[0]) {
	case KindHTTP, KindExec, KindCopy, KindPorts:
		if len(fields) == 1 {
			return Header{Kind: Kind(fields[0])}, nil
		}
	case KindTCP, KindForward:
		h := Header{Kind: Kind(fields[0])}
		switch {
		case h.Kind == KindForward && len(fields) == 2:
		case h.Kind == KindTCP && len(fields) == 3 && (fields[2] == "wait" || fields[2] == "nowait"):
			h.Wait = fields[2] == "wait"
		case h.Kind == KindTCP && len(fields) == 4 && fields[2] == "nowait":
			address, err := netip.ParseAddr(fields[3])
			if err != nil {
				return Header{}, bad
			}
			h.Address = address
		default:
			return Header{}, bad
		}
		port, err := strconv.ParseUint(fields[1], 10, 16)
		if err != nil || port == 0 {
			return Header{}, bad
		}
		h.Port = int(port)
		return h, nil
	case KindCut:
		if len(fields) != 2 {
			return Header{}, bad
		}
		id, err := strconv.ParseUint(fields[1], 10, 32)
		if err != nil {
			return Header{}, bad
		}
		return Header{Kind: KindCut, Stream: uint32(id)}, nil
	}
	return Header{}, bad
}

// ReadHeader reads a stream's header, and nothing that follows it.
func ReadHeader(r io.Reader) (Header, error) {
	line, err := readLine(r, maxHeader)
	if err != nil {
		return Header{}, err
	}
	return ParseHeader(line)
}

// WriteAnswer answers a header other than http and cut: with "ok" if refusal is nil.
func WriteAnswer(w io.Writer, refusal error) error {
	answer := "ok\n"
	if refusal != nil {
		text := strings.Join(strings.Fields(refusal.Error()), " ")
		answer = "err " + text[:min(len(text), maxAnswer-16)] + "\n"
	}
	_, err := io.WriteString(w, answer)
	return err
}

// RefusedError is what the guest said instead of "ok", quoted.
type RefusedError struct{ text string }

func (e *RefusedError) Error() string { return e.text }

// ReadAnswer reads the answer to a header, and nothing that follows it. A refusal is a *RefusedError.
func ReadAnswer(r io.Reader) error {
	line, err := readLine(r, maxAnswer)
	if err != nil {
		return err
	}
	if line == "ok" {
		return nil
	}
	if text, ok := strings.CutPrefix(line, "err "); ok {
		return &RefusedError{text: strconv.Quote(text)}
	}
	return fmt.Errorf("%q is not an answer", line)
}

// readLine reads up to a line end, a byte at a time: what follows belongs to somebody else.
func readLine(r io.Reader, most int) (string, error) {
	var line []byte
	var one [1]byte
	for len(line) < most {
		if _, err := io.ReadFull(r, one[:]); err != nil {
			if errors.Is(err, io.EOF) && len(line) > 0 {
				err = io.ErrUnexpectedEOF
			}
			return "", err
		}
		if one[0] == '\n' {
			return string(line), nil
		}
		line = append(line, one[0])
	}
	return "", fmt.Errorf("no line end within %d bytes", most)
}

// CloseWriter is a connection whose sending side can be closed alone.
type CloseWriter interface {
	net.Conn
	CloseWrite() error
}
