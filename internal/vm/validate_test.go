package vm

import (
	"fmt"
	"strings"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

func TestValidateName(t *testing.T) {
	for _, ok := range []string{"a", "calm-otter", "web-1", "cafe", "deadbeef", "3d-printer", strings.Repeat("x", 63), "a--b"} {
		if err := ValidateName(ok); err != nil {
			t.Errorf("%q: %v", ok, err)
		}
	}
	for name, want := range map[string]struct{ message, hint string }{
		"":                       {"is empty", "calm-otter"},
		"Calm-Otter":             {"upper-case letter 'C'", "--name calm-otter"},
		"calm otter":             {"' '", "--name calm-otter"},
		"calm_otter":             {"'_'", "--name calm-otter"},
		"calm.otter":             {"'.'", "--name calm-otter"},
		"-otter":                 {"hyphen", "--name otter"},
		"otter-":                 {"hyphen", "--name otter"},
		"localhost":              {"reserved", "calm-otter"},
		"LOCALHOST":              {"upper-case", "calm-otter"},
		"1234":                   {"only digits", "calm-otter"},
		"aa12bb34cc56":           {"id", "calm-otter"},
		strings.Repeat("x", 64):  {"64 characters", strings.Repeat("x", 63)},
		"ötter":                  {"'ö'", "--name tter"},
		"a\nb":                   {`'\n'`, "--name a-b"},
		"../etc":                 {"'.'", "--name etc"},
		string(NewID()):          {"id", "calm-otter"},
		strings.Repeat("é", 1e4): {"20000", "calm-otter"},
	} {
		err := ValidateName(name)
		if !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), want.message) || !strings.Contains(fault.HintOf(err), want.hint) {
			t.Errorf("%.40q: %v, hint %q; want %q, %q", name, err, fault.HintOf(err), want.message, want.hint)
			continue
		}
		if len(err.Error()) > 300 {
			t.Errorf("%.40q: the message floods the terminal", name)
		}
		if _, typed, ok := strings.Cut(fault.HintOf(err), "--name "); ok && !strings.Contains(typed, " ") {
			if err := ValidateName(typed); err != nil {
				t.Errorf("the hint itself is refused: %v", err)
			}
		}
	}
}

func TestValidateSpec(t *testing.T) {
	host := Host{CPUs: 2, MemoryMiB: 4096}
	good := Spec{VCPU: 2, MemoryMiB: 1024, DiskSize: 8 * GiB, SystemSize: 16 * GiB}
	for name, c := range map[string]struct {
		change  func(*Spec)
		host    Host
		message string // "" is valid
		hint    string
	}{
		"good":                  {func(*Spec) {}, host, "", ""},
		"smallest":              {func(s *Spec) { s.VCPU, s.MemoryMiB = 1, 128 }, host, "", ""},
		"more vcpus than cores": {func(s *Spec) { s.VCPU = 32 }, host, "", ""},
		"all memory":            {func(s *Spec) { s.MemoryMiB = 4096 }, host, "", ""},
		"unknown host":          {func(s *Spec) { s.MemoryMiB = 1 << 20 }, Host{}, "", ""},
		"zero vcpu":             {func(s *Spec) { s.VCPU = 0 }, host, "vcpu: 0 is not between 1 and 32", "--vcpu 1"},
		"negative vcpu":         {func(s *Spec) { s.VCPU = -3 }, host, "vcpu: -3", "--vcpu 1"},
		"absurd vcpu":           {func(s *Spec) { s.VCPU = 1 << 30 }, host, "vcpu: 1073741824", "--vcpu 2"},
		"zero memory":           {func(s *Spec) { s.MemoryMiB = 0 }, host, "memory: 0 MiB is less than 128", "MiB"},
		"negative memory":       {func(s *Spec) { s.MemoryMiB = -1 }, host, "memory: -1 MiB", "MiB"},
		"more than the host":    {func(s *Spec) { s.MemoryMiB = 4097 }, host, "the host has no more", "--memory 2048"},
		"absurd memory":         {func(s *Spec) { s.MemoryMiB = 1 << 50 }, Host{}, "no VM may have more", "--memory"},
		"zero disk":             {func(s *Spec) { s.DiskSize = 0 }, host, "disk size: 0 is less than 512M", "16G"},
		"negative disk":         {func(s *Spec) { s.SystemSize = -GiB }, host, "system size: -", "16G"},
		"largest disk":          {func(s *Spec) { s.DiskSize = MaxDiskBytes }, host, "", ""},
		"larger than ext4":      {func(s *Spec) { s.DiskSize = MaxDiskBytes + MiB }, host, "more than 2T", "never made smaller"},
		"absurd disk":           {func(s *Spec) { s.SystemSize = 1 << 62 }, host, "system size: ", "16G"},
		"odd disk":              {func(s *Spec) { s.DiskSize = GiB + 1 }, host, "not a whole number", "16G"},
		"bad label":             {func(s *Spec) { s.Labels = map[string]string{"A": ""} }, host, `label "A"`, "--label"},
	} {
		s := good
		c.change(&s)
		err := s.Validate(c.host)
		if c.message == "" {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), c.message) || !strings.Contains(fault.HintOf(err), c.hint) {
			t.Errorf("%s: %v, hint %q; want %q, %q", name, err, fault.HintOf(err), c.message, c.hint)
		}
	}
	if n := (Spec{VCPU: 3}).Notices(host); len(n) != 1 || !strings.Contains(n[0], "3 vCPUs") {
		t.Errorf("notices: %q", n)
	}
	if n := good.Notices(host); len(n) != 0 {
		t.Errorf("notices without a reason: %q", n)
	}
}

func TestValidateLabels(t *testing.T) {
	if err := ValidateLabels(map[string]string{"team": "web", "banger.dev/x_y-z": "", "a": "two words ü"}); err != nil {
		t.Error(err)
	}
	many := map[string]string{}
	for i := range MaxLabels + 1 {
		many[fmt.Sprintf("k%d", i)] = ""
	}
	for want, l := range map[string]map[string]string{
		"limit is 32":     many,
		"no key":          {"": "x"},
		"begin and end":   {"-a": "x"},
		"character '='":   {"a=b": "x"},
		"key of 64":       {strings.Repeat("k", 64): "x"},
		"value of 256":    {"k": strings.Repeat("v", 256)},
		"unprintable":     {"k": "a\x1b[31m"},
		"unprintable ch":  {"k": "\xff"},
		"character 'ö' i": {"aöb": "x"},
	} {
		if err := ValidateLabels(l); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), want) || fault.HintOf(err) == "" {
			t.Errorf("want %q: %v", want, err)
		}
	}
}
