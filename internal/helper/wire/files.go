package wire

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// WriteFiles sends a message with descriptors (SCM_RIGHTS of unix(7)). They stay the caller's to close.
func WriteFiles(conn *net.UnixConn, message any, files ...*os.File) error {
	body, err := json.Marshal(message)
	if err != nil {
		return err
	}
	fds := make([]int, len(files))
	for i, f := range files {
		fds[i] = int(f.Fd())
	}
	// They go with the first byte.
	head := binary.BigEndian.AppendUint32(nil, uint32(len(body)))
	if n, _, err := conn.WriteMsgUnix(head, unix.UnixRights(fds...), nil); err != nil || n != len(head) {
		return fmt.Errorf("descriptors cannot be passed: %w", err)
	}
	_, err = conn.Write(body)
	return err
}

// maxFiles is how many descriptors come with one message at most.
const maxFiles = 32

// ReadRequestFiles is ReadRequest for one that may come with descriptors, which are the caller's to close, also with an error.
func ReadRequestFiles(conn *net.UnixConn) (Request, []*os.File, error) {
	head, files, err := readHead(conn)
	if err != nil {
		return Request{}, files, fault.Wrap(err, fault.Invalid, Subject, "the request cannot be read")
	}
	r, err := ReadRequest(io.MultiReader(bytes.NewReader(head), conn))
	return r, files, err
}

// readHead reads the length of a message, and the descriptors that come with it.
func readHead(conn *net.UnixConn) (head []byte, files []*os.File, err error) {
	head = make([]byte, 4)
	oob := make([]byte, unix.CmsgSpace(4*maxFiles))
	n, oobn, flags, _, err := conn.ReadMsgUnix(head, oob)
	if err != nil {
		return nil, nil, err
	}
	if files, err = received(oob[:oobn]); err != nil {
		return nil, files, err
	}
	if flags&unix.MSG_CTRUNC != 0 {
		return nil, files, fmt.Errorf("more than %d descriptors come with it", maxFiles)
	}
	if n < len(head) {
		_, err = io.ReadFull(conn, head[max(n, 0):])
	}
	return head, files, err
}

// CallFiles is Call for a request with descriptors, which stay the caller's, and an answer with count of them, which are the caller's to close.
func CallFiles(ctx context.Context, socket string, r Request, send []*os.File, count int) (a Answer, files []*os.File, err error) {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	r.Revision = Revision
	conn, hangUp, err := connect(ctx, socket)
	if err != nil {
		return a, nil, err
	}
	defer hangUp()
	var sent error
	if len(send) > 0 {
		sent = WriteFiles(conn, r, send...)
	} else {
		sent = Write(conn, r)
	}
	defer func() {
		if err != nil {
			for _, f := range files {
				_ = f.Close()
			}
			files = nil
		}
	}()
	head, files, err := readHead(conn)
	if err == nil {
		a, err = ReadAnswer(io.MultiReader(bytes.NewReader(head), conn))
	}
	if err = judge(ctx, r, a, err, sent); err == nil && len(files) != count {
		err = fault.New(fault.Internal, Subject, "it answers %s with %d descriptors, not %d", r.Verb, len(files), count)
	}
	return a, files, err
}

// received are the descriptors that came with a message.
func received(oob []byte) (files []*os.File, err error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return files, err
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "from the root helper"))
		}
	}
	return files, nil
}
