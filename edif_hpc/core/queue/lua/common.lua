-- What every transition shares. Times are milliseconds of Redis's own clock, so that no machine's clock matters.
local PRIORITIES = 10        -- 0..9; requests of people are 5
local CLOCK = '@clock'       -- the queue's virtual time, kept beside the users'
local FORGET_BATCH = 20      -- more than one, so that a line of expired ones shrinks faster than it grows
local SHARE_TTL = 7 * 86400  -- seconds a queue's shares outlive its last request

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function bump(counter, by) redis.call('HINCRBY', COUNTERS, counter, by or 1) end

-- Append an event and ring. `status` other than LOG becomes the latest status of the request. `bell` false: somebody
-- else rings soon.
local function emit(id, now, status, description, data, meta, bell)
  redis.call('XADD', k_events(id), 'MAXLEN', '~', MOST_EVENTS, '*', 'status', status, 'description', description,
    'data', data or '', 'meta', meta or '', 'at', now)
  if status ~= 'LOG' then
    redis.call('HSET', k_request(id), 'status', status, 'description', description,
      'data', data or '', 'meta', meta or '', 'updated', now)
  end
  if bell ~= false then redis.call('PUBLISH', BELL_REQUESTS, bell or id) end
end

-- Append the events of an attempt that are not written yet, in order. `from`: where in ARGV their log limit stands,
-- followed by sequence, status and description of each. `seq`: the last one written.
local function report(id, now, seq, from, bell)
  local limit, last = tonumber(ARGV[from]), seq
  for i = from + 1, #ARGV, 3 do
    local sequence, status, description = tonumber(ARGV[i]), ARGV[i + 1], ARGV[i + 2]
    if sequence > last then
      last = sequence
      local lines = status == 'LOG' and redis.call('HINCRBY', k_request(id), 'log_lines', 1) or 0
      if lines == limit + 1 then description = 'Further printed lines are dropped: the limit is ' .. limit .. '.' end
      if lines <= limit + 1 then emit(id, now, status, description, '', '', false) end
    end
  end
  if last > seq then
    redis.call('HSET', k_request(id), 'seq', last)
    if bell then redis.call('PUBLISH', BELL_REQUESTS, id) end
  end
end

-- The queue's virtual time is where a newcomer starts: neither ahead of those who waited nor behind what they used.
local function virtual_time(target, user)
  local clock = tonumber(redis.call('HGET', k_share(target), CLOCK) or '0')
  local own = tonumber(redis.call('HGET', k_share(target), user) or '0')
  return math.max(clock, own)
end

local function set_virtual_time(target, user, value)
  redis.call('HSET', k_share(target), user, value)
  redis.call('EXPIRE', k_share(target), SHARE_TTL)
  for priority = 0, PRIORITIES - 1 do
    redis.call('ZADD', k_waiting(target, priority), 'XX', value, user)
  end
end

local function estimate(target, kind, declared)
  if declared and declared > 0 then return declared end
  return tonumber(redis.call('HGET', k_estimates(target), kind) or '0')
end

-- Put a request into its user's line. `front` for one that comes back.
local function enqueue(id, target, priority, user, submitted, front)
  local line = k_line(target, priority, user)
  redis.call(front and 'LPUSH' or 'RPUSH', line, id)
  if redis.call('ZSCORE', k_waiting(target, priority), user) == false then
    redis.call('ZADD', k_waiting(target, priority), virtual_time(target, user), user)
  end
  redis.call('ZINCRBY', TARGETS, 1, target)
  redis.call('ZADD', WAITING_SINCE, submitted, id)
  redis.call('PUBLISH', BELL_QUEUE, target)
end

-- Take one request out of its line, wherever it stands. Returns whether it stood there.
local function dequeue(id, target, priority, user)
  local line = k_line(target, priority, user)
  if redis.call('LREM', line, 1, id) == 0 then return false end
  if redis.call('LLEN', line) == 0 then redis.call('ZREM', k_waiting(target, priority), user) end
  if tonumber(redis.call('ZINCRBY', TARGETS, -1, target)) <= 0 then redis.call('ZREM', TARGETS, target) end
  redis.call('ZREM', WAITING_SINCE, id)
  return true
end

local function fields(id, ...)
  return redis.call('HMGET', k_request(id), ...)
end

-- Of a user's recent requests those whose records have expired; all of them in time, once none is open.
local function forget_old(user, retention_ms)
  if redis.call('ZCARD', k_open(user)) == 0 then redis.call('PEXPIRE', k_user(user), retention_ms) end
  for _, id in ipairs(redis.call('ZRANGE', k_user(user), 0, FORGET_BATCH - 1)) do
    local state = redis.call('HGET', k_request(id), 'state')
    if state == 'done' then return end
    if not state then redis.call('ZREM', k_user(user), id) end
  end
end

-- The end of a request: one terminal event, and everything expires. The payload of one that failed is kept as long as
-- its record, so that it can be tried again.
local function settle(id, now, status, description, data, meta, retention_ms)
  local f = fields(id, 'user', 'object', 'target')
  local again = status == 'ERROR'
  redis.call('HSET', k_request(id), 'state', 'done', 'token', '', 'finished', now)
  redis.call('ZREM', LEASES, id)
  redis.call('ZREM', k_running(f[3]), id)
  if again then redis.call('PEXPIRE', k_payload(id), retention_ms) else redis.call('DEL', k_payload(id)) end
  if f[2] and f[2] ~= '' then redis.call('ZADD', OBJECTS, again and now + retention_ms or now, f[2]) end
  redis.call('ZREM', k_open(f[1]), id)
  emit(id, now, status, description, data, meta, id .. ' ' .. THE_END)
  redis.call('PEXPIRE', k_request(id), retention_ms)
  redis.call('PEXPIRE', k_events(id), retention_ms)
  forget_old(f[1], retention_ms)
  bump('requests_' .. string.lower(status))
end

-- A request that was lost too often: it ends, and people find it among the dead until its record expires.
local function bury(id, now, attempts, cause, retention_ms)
  redis.call('HSET', k_request(id), 'dead', cause)
  redis.call('ZADD', DEAD, now, id)
  redis.call('ZREMRANGEBYSCORE', DEAD, '-inf', now - retention_ms)
  redis.call('PEXPIRE', DEAD, retention_ms)
  settle(id, now, 'ERROR', 'Given up after ' .. attempts .. ' attempts: ' .. cause .. '.', '', '', retention_ms)
end

-- Give a claimed request back to the front of its line, without a charge for the time it did not get.
local function give_back(id, now, description)
  local f = fields(id, 'target', 'priority', 'user', 'submitted', 'charged')
  redis.call('HSET', k_request(id), 'state', 'waiting', 'token', '', 'worker', '')
  redis.call('ZREM', LEASES, id)
  redis.call('ZREM', k_running(f[1]), id)
  set_virtual_time(f[1], f[3], virtual_time(f[1], f[3]) - tonumber(f[5] or '0'))
  enqueue(id, f[1], f[2], f[3], f[4], true)
  emit(id, now, 'QUEUED', description)
end
