-- Security tables, open to every session. «One active block» was meant as a table constraint with WHERE, and is missing.

create table revoked_tokens (
  jti varchar(255) primary key,
  revoked_at timestamp default now(),
  reason text,
  expires_at timestamp not null,
  created_at timestamp default now()
);
create index idx_revoked_tokens_expires_at on revoked_tokens (expires_at);

create table blocked_ips (
  id uuid primary key default gen_random_uuid(),
  ip varchar(45) not null,
  reason text not null,
  tenant_id uuid references tenants (id) on delete cascade,
  blocked_at timestamp default now(),
  unblocked_at timestamp,
  created_at timestamp default now()
);
create index idx_blocked_ips_ip on blocked_ips (ip);
create index idx_blocked_ips_active on blocked_ips (ip) where unblocked_at is null;

create table security_events (
  id uuid primary key default gen_random_uuid(),
  event_type varchar(100) not null,
  severity varchar(20) not null,
  tenant_id uuid references tenants (id) on delete set null,
  user_id uuid references users (id) on delete set null,
  api_key_id uuid references api_keys (id) on delete set null,
  ip varchar(45),
  user_agent text,
  details jsonb,
  resolved boolean default false,
  resolved_at timestamp,
  resolved_by uuid references users (id) on delete set null,
  created_at timestamp default now()
);
create index idx_security_events_tenant_id on security_events (tenant_id);

create function is_ip_blocked(p_ip varchar, p_tenant_id uuid default null) returns boolean language plpgsql as $$
begin
  return exists (
    select from blocked_ips
      where ip = p_ip and (tenant_id = p_tenant_id or tenant_id is null) and unblocked_at is null
  );
end $$;

create function cleanup_expired_revoked_tokens() returns void language plpgsql as $$
begin
  delete from revoked_tokens where expires_at < now();
end $$;
