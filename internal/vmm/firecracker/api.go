package firecracker

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strconv"

	"git.thaloco.com/thaloco/banger/internal/vmm/rundir"
)

// maxAnswer bounds what is read of one answer, its head included, in bytes. The largest, of a machine with many drives,
// has some thousands.
const maxAnswer = 1 << 20

// The requests' bodies, with the names of Firecracker's API (src/firecracker/swagger/firecracker.yaml in
// its source). Only what is used: Firecracker refuses a field that it does not know. All but those that name a version are
// older than the oldest one that is accepted, and none has been taken away up to 1.16.
type (
	machineConfig struct {
		VCPU      int   `json:"vcpu_count"`
		MemoryMiB int64 `json:"mem_size_mib"`
	}
	bootSource struct {
		Kernel   string `json:"kernel_image_path"`
		Initrd   string `json:"initrd_path"`
		BootArgs string `json:"boot_args"`
	}
	drive struct {
		ID        string `json:"drive_id"`
		Path      string `json:"path_on_host"`
		Root      bool   `json:"is_root_device"`
		ReadOnly  bool   `json:"is_read_only"`
		CacheType string `json:"cache_type"`
		IOEngine  string `json:"io_engine"`
	}
	networkInterface struct {
		ID  string `json:"iface_id"`
		MAC string `json:"guest_mac"`
		TAP string `json:"host_dev_name"`
		MTU int    `json:"mtu,omitempty"` // since withMTU
	}
	vsockDevice struct {
		CID    uint32 `json:"guest_cid"`
		Socket string `json:"uds_path"`
	}
	entropy struct{}
	// drivePatch makes Firecracker open the file of a drive again and tell the guest its length.
	drivePatch struct {
		ID   string `json:"drive_id"`
		Path string `json:"path_on_host"`
	}
	action struct {
		Type string `json:"action_type"`
	}
)

// versionInfo is the one answer that is read.
type versionInfo struct {
	Version string `json:"firecracker_version"`
}

// refusal is an answer of the API that is an error, in Firecracker's own words.
type refusal struct {
	Status  int    `json:"-"`
	Message string `json:"fault_message"`
}

func (e *refusal) Error() string {
	if e.Message == "" {
		return fmt.Sprintf("status %d", e.Status)
	}
	return e.Message
}

// client speaks to one Firecracker over one connection, one request after the other. http.Transport would have two
// goroutines pass on each of them, and a machine takes a dozen before its guest runs. Not safe for concurrent use.
// Close it.
type client struct {
	conn    net.Conn
	bounded *io.LimitedReader // of conn: what may still be read of an answer
	answers *bufio.Reader     // of bounded
}

// dial connects to the API socket in dir.
func dial(ctx context.Context, dir *rundir.Dir) (*client, error) {
	conn, err := dir.Dial(ctx, apiSocket)
	if err != nil {
		return nil, err
	}
	return newClient(conn), nil
}

func newClient(conn net.Conn) *client {
	bounded := &io.LimitedReader{R: conn}
	return &client{conn: conn, bounded: bounded, answers: bufio.NewReader(bounded)}
}

func (c *client) close() { _ = c.conn.Close() }

// do makes one request and stores the answer in result unless that is nil. A *refusal is Firecracker's, and the
// next request may be made; any other error means that nobody answered, or is ctx's, and ends the connection.
func (c *client) do(ctx context.Context, method, path string, body, result any) error {
	var content io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return err
		}
		content = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://localhost"+path, content)
	if err != nil {
		return err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	stop := context.AfterFunc(ctx, c.close)
	status, b, err := c.roundTrip(req)
	if !stop() {
		return ctx.Err()
	}
	switch {
	case err != nil:
		c.close()
		return fmt.Errorf("%s %s: %w", method, path, err)
	case status/100 != 2:
		r := &refusal{Status: status}
		_ = json.Unmarshal(b, r) // what is no JSON has no message; the status is left
		return r
	case result == nil:
		return nil
	}
	if err := json.Unmarshal(b, result); err != nil {
		return fmt.Errorf("%s %s: the answer is not what it should be: %w", method, path, err)
	}
	return nil
}

// roundTrip sends a request and reads its answer to the end.
func (c *client) roundTrip(req *http.Request) (status int, body []byte, err error) {
	c.bounded.N = maxAnswer
	if err := req.Write(c.conn); err != nil {
		return 0, nil, err
	}
	answer, err := http.ReadResponse(c.answers, req)
	if err != nil {
		return 0, nil, err
	}
	defer answer.Body.Close()
	body, err = io.ReadAll(answer.Body)
	return answer.StatusCode, body, err
}

type version struct{ major, minor int }

func (v version) atLeast(w version) bool {
	return v.major > w.major || v.major == w.major && v.minor >= w.minor
}

var (
	// oldest is the first Firecracker that is accepted: the oldest one that was run.
	oldest = version{1, 12}
	// withMTU is the first that tells a guest's driver the MTU (firecracker#5828), which the guest cannot exceed then. Guests of
	// older ones learn it from their configuration alone.
	withMTU = version{1, 16}
)

var (
	// versionLine is the first line of --version: "Firecracker v1.12.1".
	versionLine = regexp.MustCompile(`(?m)^Firecracker v(\S+)\s*$`)
	versionForm = regexp.MustCompile(`^v?(\d{1,6})\.(\d{1,6})(\.|-|\+|$)`)
)

// parseVersion reads a version such as 1.12.1 or 1.14.0-dev.
func parseVersion(s string) (v version, ok bool) {
	m := versionForm.FindStringSubmatch(s)
	if m == nil {
		return v, false
	}
	v.major, _ = strconv.Atoi(m[1]) // digits by the expression
	v.minor, _ = strconv.Atoi(m[2])
	return v, true
}
