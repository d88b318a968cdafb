package agentd

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/guest/wire"
)

// The API is Connect's protocol (connectrpc.com/docs/protocol) over HTTP/1.1 (RFC 9112), as the daemon's client speaks it: binary
// protobuf, no compression, one request after another. It is served by hand, since net/http and connect bring TLS, HTTP/2, certificates
// and much else along, and what this program is made of lies in every guest's memory, and is read at every boot.

// Bounds of a request.
const (
	maxHead     = 16 << 10 // bytes of its line and fields
	keptTime    = time.Minute
	requestTime = time.Minute // until all of it is there
	answerTime  = time.Minute // one write
	servicePath = "/banger.agent.v1.AgentService/"
	unaryType   = "application/proto"
	streamType  = "application/connect+proto"
)

// code is one of Connect's error codes.
type code string

// The codes that an agent answers with, and the HTTP status of each.
const (
	codeCanceled      code = "canceled"
	codeUnknown       code = "unknown"
	codeInvalid       code = "invalid_argument"
	codeDeadline      code = "deadline_exceeded"
	codeUnimplemented code = "unimplemented"
	codeExhausted     code = "resource_exhausted"
)

var statuses = map[code]string{
	codeCanceled: "499 Canceled", codeUnknown: "500 Unknown", codeInvalid: "400 Invalid Argument", codeDeadline: "504 Deadline Exceeded",
	codeUnimplemented: "501 Unimplemented", codeExhausted: "429 Resource Exhausted",
}

// callError is an error with a code.
type callError struct {
	code code
	text string
}

func (e *callError) Error() string { return e.text }

// errorOf is what a caller is told of err.
func errorOf(err error) *callError {
	var c *callError
	switch {
	case errors.As(err, &c):
		return c
	case errors.Is(err, context.DeadlineExceeded):
		return &callError{codeDeadline, err.Error()}
	case errors.Is(err, context.Canceled):
		return &callError{codeCanceled, err.Error()}
	}
	return &callError{codeUnknown, err.Error()}
}

func (e *callError) encode() []byte {
	b, err := json.Marshal(struct {
		Code    code   `json:"code"`
		Message string `json:"message,omitempty"`
	}{e.code, e.text})
	if err != nil { // two strings are always encoded
		return []byte("{}")
	}
	return b
}

// method is one call of the API. Exactly one of the two is there.
type method struct {
	unary  func(ctx context.Context, in []byte) ([]byte, error)
	stream func(ctx context.Context, in []byte, send func([]byte) error) error
}

// unary makes a method of a function of the API.
func unary[In interface {
	*in
	proto.Message
}, in any, Out proto.Message](call func(context.Context, In) (Out, error)) method {
	return method{unary: func(ctx context.Context, body []byte) ([]byte, error) {
		request := In(new(in))
		if err := proto.Unmarshal(body, request); err != nil {
			return nil, &callError{codeInvalid, err.Error()}
		}
		answer, err := call(ctx, request)
		if err != nil {
			return nil, err
		}
		return proto.Marshal(answer)
	}}
}

// methods are the service's, by their names in api/banger/agent/v1.
func methods(s service) map[string]method {
	return map[string]method{
		"Health":          unary(s.Health),
		"Shutdown":        unary(s.Shutdown),
		"Sync":            unary(s.Sync),
		"GrowFilesystems": unary(s.GrowFilesystems),
		"Stats":           unary(s.Stats),
		"Ports":           unary(s.Ports),
		"Trim":            unary(s.Trim),
		"SetClock":        unary(s.SetClock),
		"WatchBoot": {stream: func(ctx context.Context, _ []byte, send func([]byte) error) error { // the request is empty
			return s.WatchBoot(ctx, func(r *agentv1.WatchBootResponse) error {
				b, err := proto.Marshal(r)
				if err != nil {
					return err
				}
				return send(b)
			})
		}},
	}
}

// request is what matters of an HTTP request.
type request struct {
	method, path string
	contentType  string
	encoding     string
	length       int64 // of the body; -1: chunked
	timeout      time.Duration
	last         bool // the client wants the connection to end after it
}

// serveHTTP answers requests on a connection until it ends, ctx ends, or something comes that is no request.
func (s *Server) serveHTTP(ctx context.Context, conn net.Conn) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	in := bufio.NewReaderSize(conn, 4<<10)
	for kept := headerTime; ; kept = keptTime {
		if conn.SetReadDeadline(time.Now().Add(kept)) != nil {
			return
		}
		if _, err := in.Peek(1); err != nil {
			return
		}
		if conn.SetReadDeadline(time.Now().Add(requestTime)) != nil {
			return
		}
		r, err := readHead(in)
		if err != nil {
			_ = writeReply(conn, "400 Bad Request", "text/plain", []byte(err.Error()), true)
			return
		}
		body, err := readBody(in, r.length)
		if err != nil {
			_ = writeReply(conn, statuses[codeExhausted], "application/json", errorOf(err).encode(), true)
			return
		}
		if s.answer(ctx, conn, in, r, body) != nil || r.last {
			return
		}
	}
}

// answer runs the call of one request. While it runs, the client going away ends its context; an error is the connection's.
func (s *Server) answer(ctx context.Context, conn net.Conn, in *bufio.Reader, r request, body []byte) error {
	m, known := s.methods[strings.TrimPrefix(r.path, servicePath)]
	stream := r.contentType == streamType
	switch {
	case !strings.HasPrefix(r.path, servicePath) || !known: // Connect's clients take it for unimplemented
		return writeReply(conn, "404 Not Found", "text/plain", nil, r.last)
	case r.method != "POST":
		return writeReply(conn, "405 Method Not Allowed", "text/plain", nil, r.last)
	case r.encoding != "" && r.encoding != "identity", stream != (m.stream != nil), !stream && r.contentType != unaryType:
		return writeReply(conn, "415 Unsupported Media Type", "text/plain", nil, r.last)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if r.timeout > 0 {
		var end context.CancelFunc
		ctx, end = context.WithTimeout(ctx, r.timeout)
		defer end()
	}
	if err := conn.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	// The client says nothing before the answer: a read that returns means that it is gone, or began its next request.
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		if _, err := in.Peek(1); err != nil {
			cancel()
		}
	}()
	err := reply(ctx, conn, m, r, body)
	// Not while it reads: the reader is the next request's. A deadline in the past ends the read and leaves what came.
	if deadline := conn.SetReadDeadline(time.Unix(1, 0)); deadline != nil {
		_ = conn.Close()
		err = errors.Join(err, deadline)
	}
	<-watched
	return err
}

// reply calls the method and writes what comes of it.
func reply(ctx context.Context, conn net.Conn, m method, r request, body []byte) error {
	if m.unary != nil {
		answer, err := m.unary(ctx, body)
		if err == nil && len(answer) > wire.MaxMessage {
			err = &callError{codeExhausted, fmt.Sprintf("the answer has %d bytes, the most is %d", len(answer), wire.MaxMessage)}
		}
		if err != nil {
			e := errorOf(err)
			return writeReply(conn, statuses[e.code], "application/json", e.encode(), r.last)
		}
		return writeReply(conn, "200 OK", unaryType, answer, r.last)
	}
	message, err := envelope(body)
	if err != nil {
		return writeReply(conn, "400 Bad Request", "text/plain", []byte(err.Error()), r.last)
	}
	if err := write(conn, []byte("HTTP/1.1 200 OK\r\nContent-Type: "+streamType+"\r\nTransfer-Encoding: chunked\r\n\r\n")); err != nil {
		return err
	}
	err = m.stream(ctx, message, func(b []byte) error { return writeEnvelope(conn, 0, b) })
	end := []byte("{}")
	if err != nil {
		end = append(append([]byte(`{"error":`), errorOf(err).encode()...), '}')
	}
	if err := writeEnvelope(conn, endStream, end); err != nil {
		return err
	}
	return write(conn, []byte("0\r\n\r\n"))
}

// The flags and the length before each message of a stream.
const (
	envelopeSize = 5
	endStream    = 2
)

// envelope is the one message of a request to a stream.
func envelope(body []byte) ([]byte, error) {
	if len(body) < envelopeSize || body[0] != 0 || uint64(binary.BigEndian.Uint32(body[1:])) != uint64(len(body)-envelopeSize) {
		return nil, errors.New("not one message")
	}
	return body[envelopeSize:], nil
}

// writeEnvelope writes a message as a chunk.
func writeEnvelope(conn net.Conn, flags byte, message []byte) error {
	b := fmt.Appendf(nil, "%x\r\n", envelopeSize+len(message))
	b = binary.BigEndian.AppendUint32(append(b, flags), uint32(len(message)))
	return write(conn, append(append(b, message...), "\r\n"...))
}

// writeReply writes a whole response.
func writeReply(conn net.Conn, status, contentType string, body []byte, last bool) error {
	closing := ""
	if last {
		closing = "Connection: close\r\n"
	}
	b := fmt.Appendf(nil, "HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n%s\r\n", status, contentType, len(body), closing)
	return write(conn, append(b, body...))
}

func write(conn net.Conn, b []byte) error {
	if err := conn.SetWriteDeadline(time.Now().Add(answerTime)); err != nil {
		return err
	}
	_, err := conn.Write(b)
	return err
}

// readHead reads a request's line and fields, and nothing that follows.
func readHead(in *bufio.Reader) (request, error) {
	var r request
	left := maxHead
	line, err := readLine(in, &left)
	if err != nil {
		return r, err
	}
	fields := strings.Split(line, " ")
	if len(fields) != 3 || fields[2] != "HTTP/1.1" {
		return r, errors.New("not a request of HTTP/1.1")
	}
	r.method, r.path = fields[0], fields[1]
	sized := false
	for {
		line, err := readLine(in, &left)
		if err != nil {
			return r, err
		}
		if line == "" {
			return r, nil
		}
		name, value, ok := strings.Cut(line, ":")
		if !ok {
			return r, errors.New("a field without a colon")
		}
		value = strings.Trim(value, " \t")
		switch strings.ToLower(name) {
		case "content-type":
			r.contentType = value
		case "content-encoding", "connect-content-encoding":
			r.encoding = value
		case "content-length":
			n, err := strconv.ParseUint(value, 10, 31)
			if err != nil || sized {
				return r, errors.New("a length that is none")
			}
			r.length, sized = int64(n), true
		case "transfer-encoding":
			if value != "chunked" || sized {
				return r, errors.New("a transfer encoding other than chunked")
			}
			r.length, sized = -1, true
		case "connect-timeout-ms":
			ms, err := strconv.ParseUint(value, 10, 40)
			if err != nil {
				return r, errors.New("a time that is none")
			}
			r.timeout = time.Duration(ms) * time.Millisecond
		case "connection":
			r.last = r.last || strings.EqualFold(value, "close")
		}
	}
}

// readLine reads a line without its end, within what is left of the bytes for a head.
func readLine(in *bufio.Reader, left *int) (string, error) {
	var line []byte
	for {
		part, err := in.ReadSlice('\n')
		if *left -= len(part); *left < 0 {
			return "", fmt.Errorf("more than %d bytes before the body", maxHead)
		}
		line = append(line, part...)
		if err == nil {
			return strings.TrimSuffix(strings.TrimSuffix(string(line), "\n"), "\r"), nil
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return "", err
		}
	}
}

// readBody reads a body of so many bytes, or of chunks if that is -1.
func readBody(in *bufio.Reader, length int64) ([]byte, error) {
	const most = wire.MaxMessage + envelopeSize
	tooLong := &callError{codeExhausted, fmt.Sprintf("the request has more than %d bytes", most)}
	if length >= 0 {
		if length > most {
			return nil, tooLong
		}
		body := make([]byte, length)
		_, err := io.ReadFull(in, body)
		return body, err
	}
	var body []byte
	for {
		left := maxHead
		line, err := readLine(in, &left)
		if err != nil {
			return nil, err
		}
		size, _, _ := strings.Cut(line, ";") // extensions mean nothing here
		n, err := strconv.ParseUint(strings.Trim(size, " \t"), 16, 31)
		if err != nil {
			return nil, &callError{codeInvalid, "a chunk without a size"}
		}
		if n == 0 {
			break
		}
		if uint64(len(body))+n > most {
			return nil, tooLong
		}
		at := len(body)
		body = append(body, make([]byte, n)...)
		if _, err := io.ReadFull(in, body[at:]); err != nil {
			return nil, err
		}
		if line, err = readLine(in, &left); err != nil || line != "" {
			return nil, &callError{codeInvalid, "a chunk that is longer than its size"}
		}
	}
	for left := maxHead; ; { // trailers mean nothing here
		if line, err := readLine(in, &left); err != nil || line == "" {
			return body, err
		}
	}
}
