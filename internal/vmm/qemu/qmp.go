package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// maxLine bounds one QMP message: what is sent to us is a few hundred bytes.
const maxLine = 1 << 20

// event is a QMP event (QEMU's docs/interop/qmp-spec).
type event struct {
	Name string
	Data json.RawMessage
}

// qmpError is QEMU's refusal of a command.
type qmpError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *qmpError) Error() string { return e.Desc }

// errQMPClosed is why a command fails on a monitor that went away.
var errQMPClosed = errors.New("the monitor's connection is closed")

// qmp is a client of one monitor connection. A monitor serves one connection at a time, so this
// one is kept for as long as the machine is watched. Safe for concurrent use.
type qmp struct {
	conn    net.Conn
	version string        // of QEMU, from the greeting
	onEvent func(event)   // called by the reader, in order; must not block and must not send commands
	gone    chan struct{} // closed when the reader has seen everything

	mu      sync.Mutex
	nextID  int
	pending map[int]chan reply
	err     error // why the connection ended
}

type reply struct {
	value json.RawMessage
	err   error
}

type message struct {
	QMP *struct {
		Version struct {
			QEMU struct{ Major, Minor, Micro int } `json:"qemu"`
		} `json:"version"`
	} `json:"QMP"`
	Event  string          `json:"event"`
	Data   json.RawMessage `json:"data"`
	ID     *int            `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *qmpError       `json:"error"`
}

// newQMP greets the monitor behind conn, which it owns, and leaves negotiation mode. ctx bounds the
// greeting: a monitor that serves someone else accepts the connection and says nothing.
func newQMP(ctx context.Context, conn net.Conn, onEvent func(event)) (*qmp, error) {
	q := &qmp{conn: conn, onEvent: onEvent, gone: make(chan struct{}), pending: map[int]chan reply{}}
	greeted := make(chan error, 1)
	go q.read(greeted)
	var err error
	select {
	case err = <-greeted:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err == nil {
		err = q.do(ctx, "qmp_capabilities", nil, nil)
	}
	if err != nil {
		q.close()
		return nil, err
	}
	return q, nil
}

// read is the only reader. It ends with the connection, and then fails what still waits.
func (q *qmp) read(greeted chan<- error) {
	defer close(q.gone)
	r := bufio.NewReaderSize(q.conn, 4096)
	for {
		m, err := readMessage(r)
		if err != nil {
			q.fail(err)
			select {
			case greeted <- err: // nobody waits for it after the greeting; the channel has room for one
			default:
			}
			return
		}
		switch {
		case m.QMP != nil:
			v := m.QMP.Version.QEMU
			q.version = fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro)
			select {
			case greeted <- nil:
			default:
			}
		case m.Event != "":
			q.onEvent(event{Name: m.Event, Data: m.Data})
		case m.ID != nil:
			q.mu.Lock()
			c := q.pending[*m.ID]
			delete(q.pending, *m.ID)
			q.mu.Unlock()
			if c == nil {
				continue // whoever asked has given up
			}
			if m.Error != nil {
				c <- reply{err: m.Error}
			} else {
				c <- reply{value: m.Return}
			}
		}
	}
}

// readMessage reads one line, bounded, and parses it.
func readMessage(r *bufio.Reader) (m message, err error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		line = append(line, part...)
		if len(line) > maxLine {
			return m, fmt.Errorf("a message of the monitor is longer than %d bytes", maxLine)
		}
		if err == nil {
			break
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return m, err
		}
	}
	if err := json.Unmarshal(line, &m); err != nil {
		return m, fmt.Errorf("what the monitor says is not QMP: %w", err)
	}
	return m, nil
}

// fail ends the connection and everything that waits for it.
func (q *qmp) fail(err error) {
	if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
		err = errQMPClosed
	}
	_ = q.conn.Close()
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.err == nil {
		q.err = err
	}
	for id, c := range q.pending {
		delete(q.pending, id)
		c <- reply{err: q.err}
	}
}

// close ends the connection and returns when the reader has ended. QEMU goes on.
func (q *qmp) close() {
	q.fail(errQMPClosed)
	<-q.gone
}

// do runs a command, with arguments unless args is nil, and stores what it returns in result, unless that is nil. A *qmpError is
// QEMU's refusal; anything else means that the connection is of no more use, or ctx's error.
func (q *qmp) do(ctx context.Context, command string, args, result any) error {
	c := make(chan reply, 1)
	q.mu.Lock()
	if q.err != nil {
		defer q.mu.Unlock()
		return fmt.Errorf("%s: %w", command, q.err)
	}
	q.nextID++
	id := q.nextID
	q.pending[id] = c
	request := map[string]any{"execute": command, "id": id}
	if args != nil {
		request["arguments"] = args
	}
	line, err := json.Marshal(request)
	if err == nil {
		// Under the lock, so that lines do not mix. They are short: a write only waits for a
		// QEMU that reads no more.
		_ = q.conn.SetWriteDeadline(time.Now().Add(monitorTime))
		_, err = q.conn.Write(append(line, '\n'))
	}
	q.mu.Unlock()
	if err != nil {
		q.fail(err)
		return fmt.Errorf("%s: %w", command, err)
	}
	select {
	case r := <-c:
		if r.err != nil {
			return fmt.Errorf("%s: %w", command, r.err)
		}
		if result == nil {
			return nil
		}
		return json.Unmarshal(r.value, result)
	case <-ctx.Done():
		q.mu.Lock()
		delete(q.pending, id)
		q.mu.Unlock()
		return fmt.Errorf("%s: %w", command, ctx.Err())
	}
}
