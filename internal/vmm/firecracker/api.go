package firecracker

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"sync"

	"git.thaloco.com/thaloco/banger/internal/vmm/rundir"
)

// maxAnswer bounds what is read of one answer, in bytes. The largest, of a machine with many drives,
// has some thousands.
const maxAnswer = 1 << 20

// The requests' bodies, with the names of Firecracker's API (src/firecracker/swagger/firecracker.yaml in
// its source). Only what is used: Firecracker refuses a field that it does not know. All of these are
// older than the oldest version that is accepted, and none has been taken away up to 1.16.
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
	networkInterface struct { // no MTU: the field is younger than the oldest version; the guest is told otherwise
		ID  string `json:"iface_id"`
		MAC string `json:"guest_mac"`
		TAP string `json:"host_dev_name"`
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

// client speaks to one Firecracker over its socket. Close it: its connections are kept meanwhile.
type client struct {
	http http.Client
	kept *http.Transport

	// The transport dials in goroutines of its own, which may outlive the request that wanted a connection.
	over    context.Context // ends with close
	end     context.CancelFunc
	mu      sync.Mutex
	closed  bool
	dialing sync.WaitGroup
}

// newClient returns a client for the API socket in dir, which must stay open until it is closed.
func newClient(dir *rundir.Dir) *client {
	c := &client{}
	c.over, c.end = context.WithCancel(context.Background())
	c.kept = &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx, dir) },
		DisableCompression:     true,
		MaxResponseHeaderBytes: 16 << 10,
	}
	c.http.Transport = c.kept
	return c
}

func (c *client) dial(ctx context.Context, dir *rundir.Dir) (net.Conn, error) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil, net.ErrClosed
	}
	c.dialing.Add(1)
	c.mu.Unlock()
	defer c.dialing.Done()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(c.over, cancel)()
	return dir.Dial(ctx, apiSocket)
}

// close returns when nothing uses the directory any more.
func (c *client) close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.end()
	c.dialing.Wait()
	c.kept.CloseIdleConnections()
}

// do makes one request and stores the answer in result unless that is nil. A *refusal is Firecracker's;
// any other error means that nobody answered, or ctx's error.
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
	answer, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	b, err := io.ReadAll(io.LimitReader(answer.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if answer.StatusCode/100 != 2 {
		r := &refusal{Status: answer.StatusCode}
		_ = json.Unmarshal(b, r) // what is no JSON has no message; the status is left
		return r
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(b, result); err != nil {
		return fmt.Errorf("%s %s: the answer is not what it should be: %w", method, path, err)
	}
	return nil
}

type version struct{ major, minor int }

func (v version) atLeast(w version) bool {
	return v.major > w.major || v.major == w.major && v.minor >= w.minor
}

// oldest is the first Firecracker that is accepted: the oldest one that was run.
var oldest = version{1, 12}

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
